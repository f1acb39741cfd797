"""A job that takes too much memory, and one that breaks the device's context: each fails alone."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from collect.jobs import Job
from collect.jobs.local import LocalEngine
from evaluate.gpu.checks import CheckFailed

_TOO_MUCH = 1 << 50
"""Bytes that no device has."""


def out_of_memory(device: torch.device) -> str:
    """The process goes on, and what it held is free again."""
    return _then_a_good_one(device, take_too_much.__name__)


def device_assert(device: torch.device) -> str:
    """The process cannot go on, and is replaced."""
    return _then_a_good_one(device, index_out_of_range.__name__)


def take_too_much(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """A job that first takes memory that there is, and then too much."""
    held = [torch.ones(1 << 20, device=payload["device"]) for _ in range(16)]
    torch.empty(_TOO_MUCH, dtype=torch.uint8, device=payload["device"])
    return {"held": len(held)}


def index_out_of_range(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """A job whose kernel fails; nothing waits for it."""
    index = torch.tensor([5], device=payload["device"])
    torch.ones(2, device=payload["device"]).index_select(0, index)
    return {}


def good(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """A job that computes something, and says what its process holds."""
    device = torch.device(payload["device"])
    held = torch.cuda.memory_reserved() if device.type == "cuda" else 0
    total = float((torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum())
    return {"total": total, "held": held, "pid": os.getpid()}


def _then_a_good_one(device: torch.device, bad: str) -> str:
    results: dict[str, dict[str, Any]] = {}
    names = ("good", bad, "good")
    jobs = [Job(str(number), name, f"{__name__}:{name}", {"device": device.type}) for number, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        engine = LocalEngine(1, 1, str(device))
        engine.run(jobs, root, lambda name: root / f"{name}.log", lambda job, event: results.update({job.id: event}))
    before, failed, after = (results[job.id] for job in jobs)
    why = failed.get("failed")
    if not why:
        raise CheckFailed(f"{bad} did not fail")
    if "done" not in before or after.get("done", {}).get("total") != 64.0**3:
        raise CheckFailed(f"the good job after {bad} ({why}) failed: {after.get('failed', after)}")
    if after["done"]["held"]:
        raise CheckFailed(f"after {bad} the process still held {after['done']['held'] / 1e6:.0f} MB")
    same = before["done"]["pid"] == after["done"]["pid"]
    if device.type == "cuda" and same != (bad == take_too_much.__name__):
        raise CheckFailed(f"after {bad} ({why}) the next job had {'the same' if same else 'a new'} process")
    return f"failed ({why:.60}), then a good job in {'the same' if same else 'a new'} process"
