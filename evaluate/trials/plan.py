"""From a suite to its trials: every name and file checked, every trial under an id made of its configuration."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from collect.jobs.local import Job, default_slots, visible_gpus
from collect.training.device import pick_device
from collect.training.state import steps_per_epoch
from collect.workloads import Workload, own_code
from data.sources import load_source
from evaluate.trials.freezing import UNDER_AUGMENTATION
from evaluate.trials.lora import with_lora
from evaluate.trials.suite import PolicyEntry, Suite, WorkloadEntry
from evaluate.trials.trial import build_workload
from predictor.errors import UsageError
from predictor.model.file import fingerprint, load_predictor
from predictor.policies import POLICIES, make_policy, policy_class
from predictor.policies.base import FreezePolicy
from predictor.policies.smartfrz import SHIPPED
from predictor.shared.user_code import code_of

TRAINED = Path("runs/predictor.safetensors")
"""Where `python -m predictor train` leaves a predictor."""


class SuiteFolder:
    """Names every file of a suite's results."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.suite = root / "suite.json"
        self.results = root / "results.jsonl"
        self.lock = root / ".lock"
        self.earlier = root / "earlier.jsonl"
        """Results that the suite no longer asks for, such as those with the predictor before."""

    def log(self, trial_id: str) -> Path:
        """What a trial printed."""
        return self.root / "logs" / f"{trial_id}.log"

    def predictor(self, mark: str) -> Path:
        """The suite's own copy of the predictor with a fingerprint, so that training another one changes no trial."""
        return self.root / "predictors" / f"{mark}.safetensors"


@dataclass(frozen=True)
class Settings:
    """How a suite is run."""

    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, ... or mps."""
    slots: int | None = None
    """Trials at once; by default one a GPU, or one a CPU core where there is no GPU."""
    predictor: Path | None = None
    """The file for policies that take a predictor and whose options name none; by default the one trained here, else
    the one that ships, and in a suite about the latter that one."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots={self.slots}: at least one trial must run at a time")

    @property
    def chosen_slots(self) -> int:
        """Trials at once."""
        return self.slots or default_slots(self.device)

    @property
    def sharing(self) -> int:
        """Trials that share this machine's cores, or one GPU. With more than one, wall-clock time compares nothing."""
        return -(-self.chosen_slots // max(1, len(visible_gpus(self.device))))


@dataclass(frozen=True)
class Plan:
    """A suite's trials."""

    suite: Suite
    settings: Settings
    jobs: tuple[Job, ...]
    """In the order in which they run."""
    predictors: Mapping[str, Path]
    """The predictor files that are used, by their fingerprint."""


@dataclass(frozen=True)
class _Work:
    entry: WorkloadEntry
    workload: Workload

    @cached_property
    def code(self) -> str:
        """A fingerprint of the user's own file; empty for a workload of the toolkit's."""
        return own_code(self.entry.name)


@dataclass(frozen=True)
class _Judge:
    entry: PolicyEntry
    mark: str | None
    """The fingerprint of its predictor file; None for a policy that takes none."""

    @cached_property
    def code(self) -> str:
        """A fingerprint of the user's own file; empty for a policy of the toolkit's."""
        return "" if self.entry.name in POLICIES else code_of(policy_class(self.entry.name))

    def options(self, predictor: str | None, seed: int) -> dict[str, Any]:
        """The policy's options, with `predictor` where it takes one, and the trial's seed where it draws by one.

        A policy's own draws are chance as the first weights are, and intervals have to hold it too.
        """
        drawn = _takes(self.entry.name).get("seed")
        by_seed = drawn is not None and drawn.default != seed  # with the default's own id, as ever
        own = {"seed": seed} if by_seed else {}
        return {**own, **self.entry.options, **({} if self.mark is None else {"predictor": predictor})}


def make_plan(suite: Suite, folder: SuiteFolder, settings: Settings) -> Plan:
    """Check all that a suite names, and list its trials. Trains and writes nothing.

    Raises UsageError or FileFault for a workload, recipe, source, policy, option or predictor file that does not work,
    and for two of them that do not work together.
    """
    device = pick_device(settings.device).type
    works = {entry.label: _Work(entry, _checked(entry)) for entry in suite.workloads}
    judges, predictors = {}, {}
    for entry in suite.policies:
        path = _predictor_of(entry, SHIPPED if settings.predictor is None and suite.shipped else settings.predictor)
        judge = judges[entry.label] = _Judge(entry, None if path is None else fingerprint(path))
        policy = make_policy(entry.name, **judge.options(str(path), suite.seeds[0]))
        if path is not None and judge.mark is not None:
            predictors[judge.mark] = path
        for work in works.values():
            _refuse_unfit(work, entry, policy)
    where = {"device": device, "slots": settings.sharing, "scores": suite.scores}
    jobs = [_job(seed, works[work.label], judges[policy.label], folder, where) for seed, work, policy in suite.cells()]
    return Plan(suite, settings, tuple(jobs), predictors)


def find_predictor(given: Path | None) -> Path:
    """The predictor to use: the one given, else the one trained here, else the one that ships."""
    if given is not None:
        return given
    found = next((path for path in (TRAINED, SHIPPED) if path.exists()), None)
    if found is None:
        raise UsageError(
            f"the suite needs a predictor, and there is no {TRAINED}: run `python -m predictor train` (after "
            "`python -m collect gather trajectories`), or give --predictor PATH"
        )
    return found


def _checked(entry: WorkloadEntry) -> Workload:
    workload = build_workload(entry.name, entry.source, entry.recipe)
    load_source(workload.source, train_samples=workload.recipe.train_samples)
    return workload


def _refuse_unfit(work: _Work, entry: PolicyEntry, policy: FreezePolicy) -> None:
    """Raise UsageError where a workload cannot be trained the way that a policy's entry says."""
    if entry.cache and work.workload.recipe.augment and entry.cache not in UNDER_AUGMENTATION:
        raise UsageError(
            f"policy {entry.label!r} keeps features (cache = {json.dumps(entry.cache)}), and {work.entry.label} "
            f"augments its samples, so that they are never the same: take one of {', '.join(UNDER_AUGMENTATION)}, "
            "leave the cache out, or set augment = false in the recipe"
        )
    _refuse_sieve(work, entry)
    if entry.stop and (policy.unfreezes or not policy.freezes):
        raise UsageError(
            f"policy {entry.label!r} ends once all layers are frozen for good (stop = true), and with {entry.name} "
            'they never are: leave it out, or break off at a fixed time with name = "stopped"'
        )
    if entry.lora is None:
        return
    if entry.cache or policy.freezes:
        raise UsageError(
            f"policy {entry.label!r} trains adapters (lora = {entry.lora}), and then there is no layer to freeze: "
            'give it name = "none", "shorter" or "stopped", and no cache'
        )
    if entry.sparse:
        raise UsageError(
            f"policy {entry.label!r} trains adapters (lora = {entry.lora}) beside weights that stand still, and masks "
            f"would take most of those (sparse = {entry.sparse}): leave one of the two out"
        )
    with_lora(work.workload, entry.lora)


def _refuse_sieve(work: _Work, entry: PolicyEntry) -> None:
    if not entry.sieve:
        return
    recipe = work.workload.recipe
    source = load_source(work.workload.source, train_samples=recipe.train_samples)
    samples = source.size("train")
    if round(entry.sieve * samples) == 0:
        raise UsageError(
            f"policy {entry.label!r} leaves out no sample of {work.entry.label} (sieve = {entry.sieve}), which has "
            f"{samples}: give a greater share, or leave it out"
        )
    try:
        steps_per_epoch(source, recipe, entry.sieve)
    except UsageError as error:
        raise UsageError(f"policy {entry.label!r} (sieve = {entry.sieve}) on {work.entry.label}: {error}") from error


def _predictor_of(entry: PolicyEntry, given: Path | None) -> Path | None:
    """The predictor file of a policy, read and found good; None for a policy that takes none."""
    if "predictor" not in _takes(entry.name):
        return None
    named = entry.options.get("predictor")
    path = find_predictor(given) if named is None else Path(named)
    load_predictor(path)
    return path


def _takes(policy: str) -> Mapping[str, inspect.Parameter]:
    """The settings that a policy takes."""
    return inspect.signature(policy_class(policy)).parameters


def _job(seed: int, work: _Work, judge: _Judge, folder: SuiteFolder, where: dict[str, Any]) -> Job:
    policy = judge.entry
    options = judge.options(f"sha256:{judge.mark}", seed)
    code = {key: each.code for key, each in (("policy", judge), ("workload", work)) if each.code}
    faster = {} if policy.lr_factor == 1.0 else {"lr": work.workload.recipe.lr * policy.lr_factor}
    config = {
        "workload": work.entry.name,
        "label": work.entry.label,
        "source": work.workload.source,
        "recipe": asdict(work.workload.recipe) | faster,
        "policy": {"name": policy.name, "label": policy.label, "options": options, **policy.changes},
        "seed": seed,
        "device": where["device"],
        **({"code": code} if code else {}),  # changed code of the user's makes another trial
    }
    row = {
        "trial_id": trial_id(config),
        "workload": work.entry.label,
        "family": work.workload.family,
        "source": work.workload.source,
        "policy": policy.label,
        "policy_name": policy.name,
        "policy_options": options,
        "seed": seed,
        "slots": where["slots"],
        "config": config,
    }
    payload = {
        "row": row,
        "workload": {"name": work.entry.name, "source": work.entry.source, "recipe": {**work.entry.recipe, **faster}},
        "policy": {"name": policy.name, "options": judge.options(str(folder.predictor(judge.mark or "")), seed)},
        "cache": policy.cache,
        "stop": policy.stop,
        "lora": policy.lora,
        "sieve": policy.sieve,
        "sparse": policy.sparse,
        "scores": where["scores"],
        "seed": seed,
        "device": where["device"],
    }
    title = f"{work.entry.label}, {policy.label}, seed {seed}"
    return Job(row["trial_id"], title, "evaluate.trials.trial:run_trial", payload)


def trial_id(config: Mapping[str, Any]) -> str:
    """The id of a trial with this configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
