"""A ResNet-20 pretrained by this project on half of Fashion-MNIST's classes, and its fine-tuning on the other half."""

from pathlib import Path

from torch import nn

from collect.workloads.recipe import Recipe, Workload
from collect.workloads.resnet import ResNet
from data.sources.base import Source
from predictor.errors import FileFault

WEIGHTS = Path(__file__).parent / "weights" / "resnet20-fashion-first.safetensors"
"""What `python -m collect pretrain` has made of `resnet20-first`."""


def resnet20_first() -> Workload:
    """ResNet-20 of 16 to 64 channels on half of Fashion-MNIST's classes, to be fine-tuned; about 3 minutes."""
    recipe = Recipe(epochs=10, lr=0.1, augment=True)
    return Workload("resnet20-first", "resnet", _resnet20, "fashion-first", recipe)


def resnet20_transfer() -> Workload:
    """ResNet-20 pretrained as resnet20-first, fine-tuned on the other half of the classes; about 1 minute."""
    recipe = Recipe(epochs=8, lr=0.02, train_samples=2000)
    return Workload("resnet20-transfer", "resnet", _pretrained, "fashion-last", recipe)


def load_body(model: ResNet, path: Path) -> None:
    """Load what `python -m collect pretrain` wrote, but for the head, which stays new.

    Raises FileFault when the file cannot be read, or when its tensors have other names or shapes.
    """
    import safetensors.torch

    cure = "make it with `python -m collect pretrain`"
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileFault(f"{path}: no weights that can be read ({error}); {cure}") from error
    own = model.state_dict()
    head = f"{len(model) - 1}."
    odd = own.keys() ^ found.keys()
    odd |= {n for n in own.keys() - odd if own[n].shape != found[n].shape and not n.startswith(head)}
    if odd:
        raise FileFault(f"{path}: not the weights of this network, which differ in {min(odd)}; {cure}")
    model.load_state_dict({name: own[name] if name.startswith(head) else found[name] for name in own})


def _resnet20(source: Source) -> ResNet:
    return ResNet(source, 3, 16)


def _pretrained(source: Source) -> nn.Module:
    model = _resnet20(source)
    load_body(model, WEIGHTS)
    return model
