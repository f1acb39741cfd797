"""The GPUs that slots share: which there are, the instances of divided ones, and how many jobs one takes."""

import os
import re
import subprocess
from contextlib import suppress

from predictor.errors import UsageError

_UUID = re.compile(r"\(UUID:\s*((?:GPU|MIG)-[^)\s]+)\)")
_BYTES_A_JOB = 16_000_000_000
"""Memory of a GPU for each job on it. The largest networks of the suites need 10 to 12 GB; most need one."""
_MOST_A_GPU = 4
"""Jobs that share a GPU at most: more gain little."""


def visible_gpus(device: str) -> tuple[str, ...]:
    """The GPUs to share among slots, as CUDA_VISIBLE_DEVICES names them; none for a device that is not CUDA.

    A slot sees one GPU alone, as "cuda": the job's device is "cuda" even for "cuda:1". Each instance of a GPU that is
    divided (MIG) counts as one.

    Raises:
        UsageError: `device` is "cuda" or "cuda:N", and torch sees no such GPU.
    """
    if device != "auto" and not device.startswith("cuda"):
        return ()
    names = _names()
    wanted = names[int(device[5:]) :][:1] if device.startswith("cuda:") else names
    if device != "auto" and not wanted:
        raise UsageError(f"device {device!r}: torch sees {len(names)} GPU(s) here; use --device cpu or --device auto")
    return tuple(wanted)


def jobs_a_gpu(device: str) -> int:
    """How many small jobs may share each GPU, by its memory; one where there is none, and for an instance of a GPU."""
    import torch

    if not visible_gpus(device) or any(name.startswith("MIG-") for name in visible_gpus(device)):
        return 1
    try:
        memory = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError):
        return 1
    return max(1, min(_MOST_A_GPU, min(memory, default=0) // _BYTES_A_JOB))


def environment_of(gpu: str) -> dict[str, str]:
    """The variables that show a process one GPU alone; none at all for the empty name."""
    import torch

    names = ("CUDA_VISIBLE_DEVICES", *(["HIP_VISIBLE_DEVICES"] if torch.version.hip else []))
    return dict.fromkeys(names, gpu)


def _names() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return []
    given = _given()
    if given and given[0].startswith("MIG-"):
        return given  # a process sees one of them, and slots are several
    if given:
        return given[:count]
    return _with_instances() or [str(index) for index in range(count)]


def _given() -> list[str]:
    """The user's own choice of GPUs. With ROCm its own variable comes first."""
    import torch

    text = (os.environ.get("HIP_VISIBLE_DEVICES") if torch.version.hip else None) or os.environ.get(
        "CUDA_VISIBLE_DEVICES", ""
    )
    return [name.strip() for name in text.split(",") if name.strip()]


def _with_instances() -> list[str]:
    """The UUIDs of all instances, and of the GPUs that are not divided; nothing where no GPU is divided."""
    listed = ""
    with suppress(OSError, subprocess.SubprocessError):  # not installed, or no driver
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=20).stdout
    names: list[str] = []
    whole = ""
    for name in _UUID.findall(listed):
        if name.startswith("MIG-") and whole:
            names.remove(whole)  # the GPU that the instances below it are of
        whole = name if name.startswith("GPU-") else ""
        names.append(name)
    return names if any(name.startswith("MIG-") for name in names) else []
