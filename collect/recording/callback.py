"""Recording in other people's trainers: what the callbacks share. Each trainer has a file beside this one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from collect.recording.recording import Recording
from predictor.errors import UsageError
from predictor.layers.layer import Layer

Layers = Sequence[Layer] | Callable[[nn.Module], Sequence[Layer]] | None
"""The layers to record, or a function that finds them in the trainer's model."""


class RecordingCallbackBase:
    """Holds a Recording from the start of a trainer's training to its end. One callback serves many trainings.

    Args:
        out: as in `Recording`.
        probe: as in `Recording`.
        layers: the layers to record, or a function that finds them in the trainer's model.
        options: further arguments of `Recording`: call, workload, family, source, seed, recipe, sampling.
    """

    recording: Recording | None = None
    """The recording of the current or the last training. None before the first."""
    path: Path | None = None
    """The file of the last finished training; None before, and in processes that do not write."""

    def __init__(self, out: str | Path, probe: Any, layers: Layers = None, **options: Any) -> None:
        self._out, self._probe, self._layers, self._options = out, probe, layers, options
        self._loss: Any = None

    def _start(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        total_steps: int,
        *,
        done: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        """Begin to record, or go on at a checkpoint's state.

        Args:
            model: as the trainer calls it.
            optimizers: those that train it.
            total_steps: optimizer steps of the whole training.
            done: steps that were done before, in a training that resumes.
            state: the recording's state then; None where there is none.
        """
        if done and not state:
            raise UsageError(
                f"the checkpoint at step {done} was written without this callback, so the steps before are not "
                "recorded: resume without the callback, or start a new training with it"
            )
        self._stop()
        self._loss, self.path = None, None
        self.recording = Recording(
            model,
            optimizers,
            total_steps=total_steps,
            out=self._out,
            probe=self._probe,
            layers=self._layers(model) if callable(self._layers) else self._layers,
            replace=bool(done),
            **self._options,
        )
        if done and state:
            self.recording.load_state_dict(state)

    def _add_loss(self, loss: Any) -> None:
        """Add the part of the step's loss that one batch gives."""
        self._loss = loss if self._loss is None else self._loss + loss

    def _step(self) -> None:
        assert self.recording is not None, "a trainer steps after it began to train"
        self.recording.step(self._loss)
        self._loss = None

    def _finish(self, metrics: Mapping[str, Any], accuracy: str, loss: str) -> None:
        """Write the file, with the figures of these names where there are any."""
        if self.recording is not None:
            figures = {"accuracy": metrics.get(accuracy), "loss": metrics.get(loss)}
            self.path = self.recording.finish(**{n: None if f is None else float(f) for n, f in figures.items()})

    def _stop(self) -> None:
        """Stop a recording whose training broke off."""
        if self.recording is not None:
            self.recording.close()
