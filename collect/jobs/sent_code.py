"""The code that a cluster's nodes run: this toolkit, the folder that the command was typed in, and own modules."""

import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from predictor.errors import UsageError

_CHECKOUT = Path(__file__).parents[2]
_PACKAGES = ("predictor", "data", "collect", "evaluate")
_NOT_NEEDED = (_CHECKOUT / "evaluate" / "results", _CHECKOUT / "tests")
_LEFT_OUT = ("__pycache__", "runs", "wandb", "node_modules", "build", "dist")
"""Folders that are no code, or none that a run needs. Hidden ones and virtual environments are left out too."""
_MOST_BYTES = 100_000_000


def copy_code(to: Path, modules: Iterable[str], without: Iterable[Path]) -> None:
    """Copy what the nodes need.

    Args:
        to: An empty folder, which is made. It is to be first in the nodes' module search path.
        modules: Names of modules that the jobs import, besides those that this process has imported.
        without: Folders that hold results.

    Raises:
        UsageError: More than 100 MB would have to be copied.
    """
    skipped = {path.resolve() for path in (*without, to)}
    here = Path.cwd()
    roots: dict[str, Path] = {}
    for path in sorted(here.iterdir()) if here not in _installed() else ():
        if not _is_left_out(path, skipped):
            roots[path.name] = path
    for path in _own_modules(modules):
        roots.setdefault(path.name, path)
    roots.update({name: _CHECKOUT / name for name in _PACKAGES})
    files = {Path(name, inner): path for name, root in roots.items() for inner, path in _files(root, skipped)}
    _check_size(files)
    for inside, path in files.items():
        target = to / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _files(root: Path, skipped: set[Path]) -> Iterator[tuple[Path, Path]]:
    """The files of a folder, or the file itself, with their paths inside."""
    if root.is_file():
        yield Path(), root
        return
    total = 0
    for folder, inner, names in os.walk(root):
        at = Path(folder)
        inner[:] = [name for name in inner if not _is_left_out(at / name, skipped)]
        for name in names:
            path = at / name
            if path.is_file() and not _is_left_out(path, skipped):
                yield path.relative_to(root), path
                total += path.stat().st_size
        if total > 10 * _MOST_BYTES:  # a home folder, say: the rest changes nothing
            return


def _is_left_out(path: Path, skipped: set[Path]) -> bool:
    hidden = path.name.startswith(".") or path.name.endswith((".egg-info", ".part", ".pyc"))
    if hidden or path in _NOT_NEEDED or path.resolve() in skipped:
        return True
    return path.is_dir() and (path.name in _LEFT_OUT or (path / "pyvenv.cfg").exists())


def _check_size(files: dict[Path, Path]) -> None:
    sizes = {path: path.stat().st_size for path in files.values()}
    if sum(sizes.values()) > _MOST_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        listed = ", ".join(f"{path} ({sizes[path] / 1e6:.0f} MB)" for path in largest)
        raise UsageError(
            f"{Path.cwd()}: the code to send to the nodes has {sum(sizes.values()) / 1e6:.0f} MB, and at most "
            f"{_MOST_BYTES / 1e6:.0f} MB are sent; the largest files: {listed}. Run the command in the folder of your "
            "code, and keep data and results elsewhere"
        )


def _own_modules(also: Iterable[str]) -> Iterator[Path]:
    """The files and packages of modules that are neither installed nor in the checkout, by their top-level names."""
    names = {name.partition(".")[0] for name in (*sys.modules, *also)} - {"__main__", *_PACKAGES}
    for name in sorted(names - set(sys.stdlib_module_names)):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            continue
        if spec is None:
            continue
        places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
        for place in map(Path, places):
            if place.exists() and place not in _NOT_NEEDED and not _is_installed(place.resolve()):
                yield place


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _installed())


def _installed() -> set[Path]:
    names = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    return {Path(name).resolve() for name in names if Path(name).exists()} | {Path(sys.base_prefix, "lib").resolve()}
