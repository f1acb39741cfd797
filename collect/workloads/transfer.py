"""Small networks that this project pretrains on half of a source's classes, and fine-tunes on the other half."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from collect.workloads.convnext import ConvNext
from collect.workloads.densenet import DenseNet
from collect.workloads.mixer import Mixer
from collect.workloads.mlp import Mlp
from collect.workloads.mobilenet import MobileNet
from collect.workloads.recipe import Recipe, Workload
from collect.workloads.resnet import ResNet
from collect.workloads.textcnn import TextCnn
from collect.workloads.texttransformer import TextTransformer
from collect.workloads.vgg import Vgg
from collect.workloads.vit import Vit
from data.sources.base import Source
from predictor.errors import FileFault

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the pretrained weights, made by `python -m collect pretrain`."""


@dataclass(frozen=True)
class Transfer:
    """A network, and how it is pretrained and fine-tuned."""

    family: str
    """The kind of architecture."""
    title: str
    """A description of the network."""
    network: Callable[[Source], nn.Module]
    """Builds the network for a source, with new weights."""
    source: str
    """The source: pretraining has the first half of its classes, fine-tuning the last half."""
    pretraining: Recipe
    """The recipe for the first half."""
    finetuning: Recipe
    """The recipe for the last half."""
    times: tuple[str, str]
    """The time that each of the two takes."""
    half: bool = False
    """Whether the file holds the weights in half precision, for its size."""


TRANSFERS: dict[str, Transfer] = {
    "resnet20": Transfer(
        "resnet",
        "ResNet-20 of 16 to 64 channels",
        partial(ResNet, blocks=3, width=16),
        "fashion",
        Recipe(epochs=10, lr=0.1, augment=True),
        Recipe(epochs=8, lr=0.02, train_samples=2000),
        ("3 minutes", "1 minute"),
    ),
    "vgg": Transfer(
        "vgg",
        "Six convolutions of 16 to 64 channels",
        partial(Vgg, widths=(16, 32, 64)),
        "mnist-5k",
        Recipe(epochs=6, batch_size=32, lr=0.05, augment=True),
        Recipe(epochs=6, batch_size=32, lr=0.01),
        ("15 seconds", "10 seconds"),
    ),
    "densenet": Transfer(
        "densenet",
        "Three dense blocks of three layers with growth 12",
        partial(DenseNet, layers=3, growth=12, stem_stride=2),
        "mnist-5k",
        Recipe(epochs=6, batch_size=32, lr=0.05, augment=True),
        Recipe(epochs=6, batch_size=32, lr=0.01),
        ("15 seconds", "10 seconds"),
    ),
    "convnext": Transfer(
        "convnext",
        "Four ConvNeXt blocks of 32 and 64 channels",
        partial(ConvNext, widths=(32, 64)),
        "mnist-5k",
        Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05),
        Recipe(epochs=6, batch_size=32, optimizer="adamw", lr=5e-4, weight_decay=0.05),
        ("30 seconds", "15 seconds"),
    ),
    "mlp": Transfer(
        "mlp",
        "Five linear layers of up to 128 units",
        partial(Mlp, widths=(128, 128, 64, 64)),
        "digits",
        Recipe(epochs=20, batch_size=32, lr=0.05),
        Recipe(epochs=10, batch_size=32, lr=0.01),
        ("a second", "a second"),
    ),
    "mixer": Transfer(
        "mixer",
        "Three Mixer blocks of 48 channels",
        partial(Mixer, patch=2, width=48, depth=3),
        "digits",
        Recipe(epochs=20, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05),
        Recipe(epochs=10, batch_size=32, optimizer="adamw", lr=5e-4, weight_decay=0.05),
        ("6 seconds", "2 seconds"),
    ),
    "vit": Transfer(
        "vit",
        "Three encoder blocks of 48 channels and 4 heads",
        partial(Vit, patch=2, width=48, depth=3, heads=4),
        "digits",
        Recipe(epochs=25, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0),
        Recipe(epochs=10, batch_size=32, optimizer="adamw", lr=5e-4, weight_decay=0.05, clip_norm=1.0),
        ("10 seconds", "3 seconds"),
    ),
    "textcnn": Transfer(
        "textcnn",
        "Three convolutions of 64 channels",
        partial(TextCnn, embedding=32, width=64, depth=3, dropout=0.3),
        "glosses",
        Recipe(epochs=20, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05),
        Recipe(epochs=8, optimizer="adamw", lr=1e-3, weight_decay=0.05),
        ("20 seconds", "5 seconds"),
    ),
    "mobilenet": Transfer(
        "mobilenet",
        "Six inverted residuals of 16 to 64 channels",
        partial(MobileNet, widths=(16, 32, 64), stem_stride=2),
        "fashion",
        Recipe(epochs=15, lr=0.1, augment=True),
        Recipe(epochs=8, lr=0.02, train_samples=2000),
        ("3 minutes", "40 seconds"),
    ),
    "texttransformer": Transfer(
        "texttransformer",
        "Four encoder blocks of 40 channels and 4 heads",
        partial(TextTransformer, width=40, depth=4, heads=4, dropout=0.3),
        "glosses",
        Recipe(epochs=15, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0),
        Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.05, clip_norm=1.0),
        ("2 minutes", "1 minute"),
        half=True,
    ),
    # Trained for longer: the first layers have learned more, as those of networks that people download.
    "vgg-long": Transfer(
        "vgg",
        "Six convolutions of 16 to 64 channels",
        partial(Vgg, widths=(16, 32, 64)),
        "mnist-5k",
        Recipe(epochs=20, batch_size=32, lr=0.1, augment=True),
        Recipe(epochs=8, batch_size=32, lr=0.01, train_samples=1000),
        ("1 minute", "10 seconds"),
    ),
    "densenet-long": Transfer(
        "densenet",
        "Three dense blocks of three layers with growth 12",
        partial(DenseNet, layers=3, growth=12, stem_stride=2),
        "mnist-5k",
        Recipe(epochs=20, batch_size=32, lr=0.1, augment=True),
        Recipe(epochs=8, batch_size=32, lr=0.01, train_samples=1000),
        ("1 minute", "10 seconds"),
    ),
    "vit-long": Transfer(
        "vit",
        "Four encoder blocks of 48 channels and 4 heads on patches of 4x4",
        partial(Vit, patch=4, width=48, depth=4, heads=4),
        "mnist-5k",
        Recipe(epochs=40, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05, clip_norm=1.0, augment=True),
        Recipe(
            epochs=10, batch_size=32, optimizer="adamw", lr=5e-4, weight_decay=0.05, clip_norm=1.0, train_samples=1000
        ),
        ("4 minutes", "20 seconds"),
    ),
    "textcnn-long": Transfer(
        "textcnn",
        "Three convolutions of 64 channels behind an embedding that began small",
        partial(TextCnn, embedding=32, width=64, depth=3, dropout=0.3, spread=0.02),
        "glosses",
        Recipe(epochs=30, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05),
        Recipe(epochs=8, optimizer="adamw", lr=1e-3, weight_decay=0.05),
        ("30 seconds", "5 seconds"),
        half=True,
    ),
    # Deeper ones, since networks that people download have dozens of layers.
    "vgg-deep": Transfer(
        "vgg",
        "Twelve convolutions of 16 to 64 channels",
        partial(Vgg, widths=(16, 32, 64), depth=4),
        "mnist-5k",
        Recipe(epochs=20, batch_size=32, lr=0.1, augment=True),
        Recipe(epochs=8, batch_size=16, lr=0.02, train_samples=1000),
        ("2 minutes", "20 seconds"),
        half=True,
    ),
    "densenet-deep": Transfer(
        "densenet",
        "Three dense blocks of five layers with growth 12",
        partial(DenseNet, layers=5, growth=12, stem_stride=2),
        "mnist-5k",
        Recipe(epochs=20, batch_size=32, lr=0.1, augment=True),
        Recipe(epochs=8, batch_size=16, lr=0.02, train_samples=1000),
        ("2 minutes", "20 seconds"),
        half=True,
    ),
    "convnext-deep": Transfer(
        "convnext",
        "Eight ConvNeXt blocks of 32 and 64 channels on patches of 4x4",
        partial(ConvNext, widths=(32, 64), blocks=4, patch=4, spread=0.02),
        "mnist-5k",
        Recipe(epochs=40, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05, augment=True),
        Recipe(epochs=8, batch_size=16, optimizer="adamw", lr=1e-3, weight_decay=0.05, train_samples=1000),
        ("2 minutes", "20 seconds"),
        half=True,
    ),
    "mlp-deep": Transfer(
        "mlp",
        "Nine linear layers of up to 128 units",
        partial(Mlp, widths=(128, 128, 128, 128, 64, 64, 64, 64)),
        "mnist-5k",
        Recipe(epochs=40, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.05),
        Recipe(epochs=12, batch_size=16, optimizer="adamw", lr=5e-4, weight_decay=0.05, train_samples=1000),
        ("20 seconds", "5 seconds"),
        half=True,
    ),
    "mixer-deep": Transfer(
        "mixer",
        "Eight Mixer blocks of 48 channels on patches of 4x4",
        partial(Mixer, patch=4, width=48, depth=8, spread=0.02),
        "mnist-5k",
        Recipe(epochs=40, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, augment=True),
        Recipe(epochs=8, batch_size=16, optimizer="adamw", lr=1e-3, weight_decay=0.05, train_samples=1000),
        ("2 minutes", "20 seconds"),
        half=True,
    ),
    "vit-deep": Transfer(
        "vit",
        "Eight encoder blocks of 48 channels and 4 heads on patches of 4x4",
        partial(Vit, patch=4, width=48, depth=8, heads=4, spread=0.02),
        "mnist-5k",
        Recipe(epochs=40, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0, augment=True),
        Recipe(
            epochs=8, batch_size=16, optimizer="adamw", lr=5e-4, weight_decay=0.05, clip_norm=1.0, train_samples=1000
        ),
        ("4 minutes", "30 seconds"),
        half=True,
    ),
}
"""The networks that this project pretrains, by the beginning of the names of their two workloads."""


def first(name: str) -> Workload:
    """Return the pretraining of a network of the table."""
    row = TRANSFERS[name]
    doc = f"{row.title} on {row.source}-first, half of the classes, to be fine-tuned; about {row.times[0]}."
    return Workload(f"{name}-first", row.family, row.network, f"{row.source}-first", row.pretraining, doc)


def transfer(name: str) -> Workload:
    """Return the fine-tuning of a network of the table."""
    row = TRANSFERS[name]
    doc = f"{row.title}, pretrained as {name}-first, on {row.source}-last, the other half; about {row.times[1]}."
    model = partial(_pretrained, name=name)
    return Workload(f"{name}-transfer", row.family, model, f"{row.source}-last", row.finetuning, doc)


def weights_of(name: str, folder: Path = WEIGHTS) -> Path:
    """Return the file of a network's pretrained weights, which is named after the network and its source."""
    return folder / f"{name}-{TRANSFERS[name].source}-first.safetensors"


def load_body(model: nn.Module, path: Path) -> None:
    """Load the weights of a `python -m collect pretrain`, except the head, the last linear layer.

    Raises:
        FileFault: A file that cannot be read, or whose tensors have other names or shapes.
    """
    import safetensors.torch

    cure = "make it with `python -m collect pretrain`"
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileFault(f"{path}: no weights that can be read ({error}); {cure}") from error
    own = model.state_dict()
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1] + "."
    odd = own.keys() ^ found.keys()
    odd |= {n for n in own.keys() - odd if own[n].shape != found[n].shape and not n.startswith(head)}
    if odd:
        cure = f"train on a source of the shape that it was pretrained on, or {cure}"
        raise FileFault(f"{path}: not the weights of this network, which differ in {min(odd)}; {cure}")
    model.load_state_dict({name: own[name] if name.startswith(head) else found[name] for name in own})


def _pretrained(source: Source, name: str) -> nn.Module:
    model = TRANSFERS[name].network(source)
    load_body(model, weights_of(name))
    return model
