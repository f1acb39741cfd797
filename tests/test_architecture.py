"""The house: packages, and folders inside a package, import each other one way; the library needs three packages."""

import ast
import sys
from collections import defaultdict
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
ORDER = ("predictor", "data", "collect", "evaluate")
FILES = sorted(path for name in ORDER for path in (CHECKOUT / name).rglob("*.py"))
NAMES = [str(path.relative_to(CHECKOUT)) for path in FILES]
LIBRARY = {"torch", "numpy", "safetensors"}
TRAINERS = {"transformers", "lightning", "pytorch_lightning"}


def imported(path, at_once=False):
    """The modules that a file imports: all, or `at_once` those that are imported with it and not inside a function."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(module):
    """The folder that a module of ours lies in, or the module itself where it is a package's top level."""
    path = CHECKOUT.joinpath(*module.split("."))
    if path.is_dir():
        return str(path.relative_to(CHECKOUT))
    if not path.with_suffix(".py").exists():
        return None  # a name inside a module
    within = path.relative_to(CHECKOUT)
    return str(within.parent) if len(within.parts) > 2 else str(within)


def folder_imports():
    """Which folders import which, without the composition roots and the packages' public names."""
    found = defaultdict(set)
    for path, name in zip(FILES, NAMES, strict=True):
        if path.name == "__main__.py" or name == "predictor/__init__.py":
            continue
        here = folder_of(".".join(Path(name).with_suffix("").parts).removesuffix(".__init__"))
        there = {folder_of(module) for module in imported(path) if module.split(".")[0] in ORDER}
        found[here] |= there - {here, None, *ORDER}
    return found


def test_there_is_something_to_check():
    assert {path.relative_to(CHECKOUT).parts[0] for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_packages_import_one_way(path):
    index = ORDER.index(path.relative_to(CHECKOUT).parts[0])
    ours = [name for name in imported(path) if name.split(".")[0] in ORDER]
    assert not [name for name in ours if name.endswith("__main__")]
    if path.name != "__main__.py":
        assert not [name for name in ours if ORDER.index(name.split(".")[0]) > index]


def test_no_two_folders_import_each_other():
    imports = folder_imports()
    assert imports["predictor/freezing"]

    def below(folder, passed):
        assert folder not in passed, f"a circle: {' -> '.join([*passed, folder])}"
        for other in sorted(imports.get(folder, ())):
            below(other, [*passed, folder])

    for folder in sorted(imports):
        below(folder, [])


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_first_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"


def test_a_package_has_few_modules_at_its_top():
    for package in ORDER:
        assert len(list((CHECKOUT / package).glob("*.py"))) <= 10, package


def test_the_library_needs_torch_numpy_and_safetensors_alone():
    for path, name in zip(FILES, NAMES, strict=True):
        package, folder = Path(name).parts[:2]
        if package != "predictor" or folder in ("__main__.py", "training"):
            continue
        allowed = {"predictor", *LIBRARY, *(TRAINERS if folder == "integrations" else ())}
        packages = {module.split(".")[0] for module in imported(path, at_once=True)} - set(sys.stdlib_module_names)
        assert packages <= allowed, (name, packages)
        assert "predictor.training" not in {".".join(module.split(".")[:2]) for module in imported(path)}, name
