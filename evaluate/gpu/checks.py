"""The checks by name, and how one is called and answers. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

SECOND = "second"
"""The device that stands in for a GPU where there is none: its tensors are in the CPU's memory, and it counts waits."""
SECOND_DEVICE = Path(__file__).parents[2] / "tests" / "second_device.py"


class CheckFailed(Exception):
    """Something is not as it has to be; the message has the figures."""


class CheckSkipped(Exception):
    """The check is not possible here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    target: str
    """`module:function`. The function takes the device, a `torch.device`, and returns the figures in a line. It raises
    CheckFailed or CheckSkipped."""
    about: str
    """What is checked."""
    seconds: int
    """The time limit."""
    without_gpu: str = "cpu"
    """Where it runs when there is no GPU: "cpu", SECOND, or nowhere (empty)."""


def _check(module: str, function: str, about: str, seconds: int, without_gpu: str = "cpu") -> Check:
    return Check(f"evaluate.gpu.{module}:{function}", about, seconds, without_gpu)


CHECKS: dict[str, Check] = {
    "frozen-sets": _check("agreement", "frozen_sets", "every policy freezes the same layers as on the CPU", 90, SECOND),
    "samples": _check("agreement", "samples", "the recorded weights are those of the CPU", 30, SECOND),
    "syncs": _check("syncs", "user_loop", "steps without a decision never wait for the device", 40, SECOND),
    "syncs-gather": _check("syncs", "gathering", "nor do those of a recorded training", 40, SECOND),
    "amp-bf16": _check("loops", "amp_bf16", "freeze, unfreeze and resume under bfloat16", 40),
    "amp-fp16": _check("loops", "amp_fp16", "the same under float16 with a GradScaler whose first steps overflow", 40),
    "fused": _check("loops", "fused", "the same with fused optimizers", 40),
    "foreach": _check("loops", "foreach", "the same with foreach optimizers", 40),
    "capturable": _check("loops", "capturable", "the same with a capturable optimizer", 40, SECOND),
    "compile": _check("compiled", "default", "torch.compile: the losses of eager mode", 120),
    "compile-graphs": _check("compiled", "reduce_overhead", 'the same with mode="reduce-overhead"', 120, ""),
    "ddp": _check("distributed", "ddp", "one process in DistributedDataParallel", 60),
    "fsdp2": _check("distributed", "fsdp2", "one process in fully_shard", 60),
    "cache": _check("costs", "cache", "a step with a frozen prefix, computed and from the cache", 60),
    "memory": _check("costs", "memory", "what a frozen prefix frees", 60),
    "resnet50": _check("costs", "resnet50", "ResNet-50 on images of CIFAR's size, and what the hooks take", 90),
    "out-of-memory": _check("slots", "out_of_memory", "a job that asks for too much memory, then a good one", 60),
    "device-assert": _check("slots", "device_assert", "a job that breaks its CUDA context, then a good one", 60),
}
