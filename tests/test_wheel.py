"""The wheel holds the library alone, and works far from the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
USE = """
import sys
import predictor, torch
from predictor import FreezeController, make_policy, layers_of
assert predictor.__file__.startswith(sys.argv[1]), predictor.__file__
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
controller = FreezeController(model, optimizer, make_policy("static", share=0.5), total_steps=3)
for _ in range(3):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
assert controller.frozen == {0, 1}, controller.frozen
heavy = {"h5py", "sklearn", "optuna", "wandb", "matplotlib", "torchvision", "data", "collect", "evaluate"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because a build leaves its traces where it is made.
    shutil.copytree(CHECKOUT / "predictor", folder / "source" / "predictor")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), folder / "source"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_predictor_and_nothing_else(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"predictor", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}


def test_it_is_used_from_elsewhere_without_the_extras(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{USE}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
