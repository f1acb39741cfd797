"""Recording a training that is not the toolkit's: in a loop of your own, in Hugging Face's Trainer, in Lightning's."""

from collect.recording.recording import Recording

__all__ = ["Recording"]
