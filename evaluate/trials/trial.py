"""One trial: a workload trained under a policy with a seed, and everything that the report wants to know of it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from collect.hooks.infobatch import InfoBatch, expected_share
from collect.hooks.sieve import Sieve
from collect.hooks.sparse_masks import SparseMasks
from collect.training.device import pick_device
from collect.training.loop import Training, train
from collect.training.provenance import hardware, versions
from collect.workloads import Workload, load_workload
from data.sources import load_source
from evaluate.trials.config import BY_FINGERPRINT, TrialConfig
from evaluate.trials.flops import StepFlops, steps_by_pattern
from evaluate.trials.folder import SuiteFolder
from evaluate.trials.freezing import CacheHook, FreezeHook, LookHook
from evaluate.trials.lora import with_lora
from evaluate.trials.probing import ProbeHook
from evaluate.trials.records import ACCOUNTING
from evaluate.trials.stopwatch import PeakMemory, Stopwatch, warm_up
from evaluate.trials.suite import PolicyEntry
from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.layers.flops import count_flops
from predictor.policies import make_policy


def build_workload(name: str, source: str | None, recipe: Mapping[str, Any]) -> Workload:
    """The workload of a name with another source, where one is given, and with changes to its recipe."""
    try:
        workload = load_workload(name).with_recipe(**recipe)
    except TypeError as error:
        raise UsageError(f"workload {name!r} cannot be trained with {dict(recipe)}: {error}") from error
    return workload if source is None else replace(workload, source=source)


def run_trial(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Do one trial and return its line of results.jsonl.

    Args:
        payload: A `TrialConfig`, as a job carries it.
        folder: The suite's, where the copies of predictor files are.
        progress: Takes the share of the training that is done.
    """
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    config = TrialConfig.from_payload(payload)
    entry, workload = config.policy, build_workload(config.workload, config.source, config.recipe)
    if entry.lora is not None:
        workload = with_lora(workload, entry.lora)
    source = load_source(workload.source, train_samples=workload.recipe.train_samples)
    policy = make_policy(entry.name, **_options(entry, SuiteFolder(folder)))
    if policy.lr_schedule is not None:
        workload = workload.with_recipe(schedule=policy.lr_schedule)
    device = pick_device(config.device)
    warm_up(workload, source, device)
    freezing = FreezeHook(policy, layers=None if entry.lora is None else (), stop=entry.stop)
    caching = CacheHook(freezing, entry.cache_form) if entry.cache_form else None
    probing = ProbeHook(caching) if entry.probe else None
    sieve = Sieve() if entry.sieve else None
    infobatch = InfoBatch(entry.infobatch) if entry.infobatch else None
    masks = SparseMasks(entry.sparse) if entry.sparse else None
    stopwatch, memory = Stopwatch(), PeakMemory(device)
    training = train(
        workload,
        seed=config.seed,
        hooks=[
            hook
            # The look is first: what it freezes, the probe's pass can keep the features of.
            for hook in (masks, freezing, caching, LookHook(freezing), probing, sieve, infobatch, stopwatch)
            if hook is not None
        ],
        device=config.device,
        budget=policy.budget,
        rescaled=policy.rescaled,
        progress=lambda step, total: progress(step / total),
        source=source,
        scores=config.scores,
        left_out=entry.sieve,
        cooldown=policy.lr_cooldown,
        expected=expected_share(entry.infobatch, workload.recipe.epochs) if entry.infobatch else 1.0,
    )
    measured = {
        "peak_memory_bytes": memory.bytes,
        "peak_memory_note": memory.note,
        "step_cost": stopwatch.bins,
        **_outcome(training),
        **_freezing(freezing.controller, caching, probing, training),
        "accounting": ACCOUNTING,
        "probe": None if probing is None else probing.figures,
        "sieve": None if sieve is None else sieve.figures,
        "infobatch": None if infobatch is None else infobatch.figures,
        "sparse": None if masks is None else _sparse(masks, freezing.controller, training),
    }
    facts = {"versions": versions(), "hardware": hardware(), "started": started}
    result: dict[str, Any] = finite({**config.row, **measured, **facts})
    return result


def _options(entry: PolicyEntry, folder: SuiteFolder) -> dict[str, Any]:
    """The policy's options, with the folder's copy of the predictor in place of its fingerprint."""
    if "predictor" not in entry.options:
        return dict(entry.options)
    mark = entry.options["predictor"].removeprefix(BY_FINGERPRINT)
    return {**entry.options, "predictor": str(folder.predictor(mark))}


def finite(value: Any) -> Any:
    """`value` with every number that is not finite as None: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outcome(training: Training) -> dict[str, Any]:
    finished = training.status == "finished"
    last = training.curve[-1] if finished else {}
    lost = f"the loss was no longer a finite number after step {training.step} of {training.total_steps}"
    return {
        "status": training.status,
        "error": None if finished else lost,
        "accuracy": last.get("test_accuracy"),
        "loss": last.get("test_loss"),
        "train_seconds": training.train_seconds,
        "cpu_seconds": training.cpu_seconds,
        "steps": training.step,
        "planned_steps": training.planned_steps,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "curve": training.curve,
    }


def _freezing(
    controller: FreezeController, caching: CacheHook | None, probing: ProbeHook | None, training: Training
) -> dict[str, Any]:
    """What was frozen when, what the cache did, and the FLOPs that this leaves, with those of a probed head."""
    step_flops = StepFlops(training.workload, training.source)
    for event in controller.history:  # into the trial's log
        print(f"{event}: {step_flops(frozenset(event.frozen)) / step_flops(frozenset()):.0%} of a full step's FLOPs")
    if caching is not None:
        print(f"cache: {caching.figures}")
    if probing is not None:
        print(f"probe: {probing.figures}")
    steps = steps_by_pattern(controller.history, training.step)
    return {
        "policy_seconds": controller.seconds,
        "layers": [layer.name for layer in controller.layers],
        "freezes": [event.as_dict() for event in controller.history],
        "patterns": [
            {"frozen": sorted(frozen), "step_flops": step_flops(frozen), "steps": count}
            for frozen, count in steps.items()
        ],
        "cache": None if caching is None else caching.figures,
        "flops": sum(step_flops(frozen) * count for frozen, count in steps.items())
        - _spared(caching, step_flops)
        + _beside(controller, training)
        + int(step_flops(frozenset()) * controller.looked) // training.recipe.accumulate
        + (0 if probing is None else probing.flops(step_flops)),
    }


def _spared(caching: CacheHook | None, step_flops: StepFlops) -> int:
    """FLOPs of the forward passes that the cache made unnecessary, less those that it made to find where to cut.

    These count as whole passes, though most of them skip the prefix that is tried. What is not counted is the prefix's
    pass on samples by which features are checked (`FeatureCache.checked`): 58 of 5,952 samples on the MobileNet of the
    suite `pretrained`, and 40 of 3,968 on EfficientNet-Lite0, less than 0.3 % of a training's FLOPs.
    """
    if caching is None:
        return 0
    each = [
        (step_flops(frozen) - step_flops(frozen, under), samples) for (frozen, under), samples in caching.hits.items()
    ]
    skipped = sum(spared * samples for spared, samples in each)
    return (skipped - caching.looked * step_flops.forward) // step_flops.samples


def _beside(controller: FreezeController, training: Training) -> int:
    """FLOPs of the policy's own passes through the model."""
    passes = controller.policy.passes
    if not passes:
        return 0
    probe = training.source.probe(2, training.device)
    forward_L = count_flops(training.model, controller.layers, (probe,), {}).forward_L
    return sum(sum(forward_L[: index + 1]) * samples for index, samples in passes.items()) // len(probe)


def _sparse(masks: SparseMasks, controller: FreezeController, training: Training) -> dict[str, Any]:
    """How sparse the network is; and the share of the training's FLOPs that would be left if none were spent on zeros.

    A theoretical share: dense kernels spend them, and so they are in the FLOPs of the trial's result. What a feature
    cache skips is not considered.
    """
    dense = count_flops(training.model, controller.layers, (training.source.probe(2, training.device),), {})
    steps = steps_by_pattern(controller.history, training.step)
    spent, left = (sum(cost.step(frozen) * n for frozen, n in steps.items()) for cost in (dense, masks.thinned(dense)))
    return {**masks.figures, "theoretical_flops_share": left / spent if spent else None}
