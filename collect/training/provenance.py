"""Where a result comes from: versions, hardware and date."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

COMMIT = "SMARTFRZ_COMMIT"
"""The variable with the commit, for code that was copied from a checkout to another machine."""
_PACKAGES = ("torch", "torchvision", "numpy", "h5py", "scikit-learn", "timm")


def provenance() -> dict[str, Any]:
    """Return the time, versions and hardware. Nothing names the user or the machine."""
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"made": made, "versions": versions(), "hardware": hardware()}


@cache
def versions() -> dict[str, str]:
    """Return the versions of the toolkit, with its commit, of Python and of the packages that numbers depend on."""
    import predictor

    found = {"smartfrz": predictor.__version__, "python": platform.python_version()}
    if commit := _commit():
        found["commit"] = commit
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware() -> dict[str, str | int | float | None]:
    """Return the machine's processor, cores, memory and GPU, and the threads of this process."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
    }


def determinism() -> dict[str, bool | str | None]:
    """Return what decides whether this process's GPU gives the same numbers each time."""
    import torch

    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def _commit() -> str | None:
    """The checkout's commit, with a plus sign for changed files; None outside a repository."""
    if given := os.environ.get(COMMIT):
        return given
    git = ["git", "-C", str(Path(__file__).parent)]
    with suppress(OSError, subprocess.SubprocessError):
        commit = _printed([*git, "rev-parse", "--short=12", "HEAD"])
        return commit + ("+" if _printed([*git, "status", "--porcelain", "--untracked-files=no"]) else "")
    return None


def _printed(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    with suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return None
