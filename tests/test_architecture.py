"""Imports go one way: predictor < data < collect < evaluate; the __main__ files alone may import anything."""

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
ORDER = ("predictor", "data", "collect", "evaluate")
FILES = sorted(path for name in ORDER for path in (CHECKOUT / name).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_there_is_something_to_check():
    assert {path.relative_to(CHECKOUT).parts[0] for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_go_one_way(path):
    place = ORDER.index(path.relative_to(CHECKOUT).parts[0])
    ours = [name for name in imported(path) if name.split(".")[0] in ORDER]
    assert not [name for name in ours if name.endswith("__main__")]
    if path.name != "__main__.py":
        assert not [name for name in ours if ORDER.index(name.split(".")[0]) > place]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_a_file_says_first_what_it_is_for_and_is_not_long(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 320


def test_the_library_imports_none_of_the_heavy_extras():
    allowed = {"fit.py", "tune.py", "metrics.py", "baselines.py", "plots.py", "__main__.py", "splits.py", "tracking.py"}
    allowed |= {"calibration.py"}
    heavy = {"h5py", "sklearn", "optuna", "wandb", "matplotlib", "torchvision", "tqdm"}
    for path in (CHECKOUT / "predictor").rglob("*.py"):
        if path.name not in allowed:
            assert not heavy & {name.split(".")[0] for name in imported(path)}, path
