"""From a suite to its trials: every name and file checked, every trial under an id made of its configuration."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from collect.jobs import THIS_MACHINE, Job, JobOptions, visible_gpus
from collect.training.checks import check_trainable
from collect.training.device import pick_device
from collect.training.state import steps_per_epoch
from collect.workloads import Workload, load_workload, own_code
from data.sources import load_source
from evaluate.trials.config import BY_FINGERPRINT, TrialConfig
from evaluate.trials.folder import SuiteFolder
from evaluate.trials.freezing import UNDER_AUGMENTATION
from evaluate.trials.lora import with_lora
from evaluate.trials.suite import PolicyEntry, Suite, WorkloadEntry
from evaluate.trials.trial import build_workload
from predictor.errors import FileFault, UsageError
from predictor.model.file import fingerprint, load_predictor
from predictor.policies import POLICIES, make_policy, policy_class
from predictor.policies.base import FreezePolicy
from predictor.policies.smartfrz import SHIPPED
from predictor.shared.user_code import code_of

TRAINED = Path("runs/predictor.safetensors")
"""Where `python -m predictor train` leaves a predictor."""


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
    jobs: JobOptions = THIS_MACHINE
    """Where the trials execute."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots={self.slots}: at least one trial must run at a time")

    @property
    def chosen_slots(self) -> int | None:
        """Trials at once; None for as many as a cluster has room for."""
        return self.jobs.slots(self.slots, self.device)

    @property
    def at_once(self) -> str:
        """How many trials there are at once, in words."""
        return f"{self.chosen_slots or 'as many as there is room for'} at a time"

    @property
    def sharing(self) -> int:
        """Trials that share this machine's cores, or one GPU. With more than one, wall-clock time compares nothing.

        Two where the trials run on a cluster, whose nodes may be any.
        """
        slots = self.chosen_slots if self.jobs.one_machine else None
        return 2 if slots is None else -(-slots // max(1, len(visible_gpus(self.device))))

    @property
    def device_type(self) -> str:
        """The kind of device that trials train on: cpu, cuda or mps."""
        given = self.jobs.device(self.device)
        return pick_device(given).type if self.jobs.one_machine else given.partition(":")[0]


@dataclass(frozen=True)
class Plan:
    """A suite's trials."""

    suite: Suite
    settings: Settings
    trials: tuple[TrialConfig, ...]
    """In the order in which they run."""
    predictors: Mapping[str, Path]
    """The predictor files that are used, by their fingerprint."""

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """The trials as work for a process of their own."""
        target = "evaluate.trials.trial:run_trial"
        folder = SuiteFolder(Path())
        copies = {mark: str(folder.predictor(mark)) for mark in self.predictors}

        def files(trial: TrialConfig) -> tuple[str, ...]:
            mark = str(trial.policy.options.get("predictor")).removeprefix(BY_FINGERPRINT)
            return (copies[mark],) if mark in copies else ()

        return tuple(Job(trial.id, trial.title, target, trial.as_payload(), files(trial)) for trial in self.trials)


@dataclass(frozen=True)
class _Work:
    """A suite's workload, loaded."""

    entry: WorkloadEntry
    workload: Workload
    code: str
    """A fingerprint of the user's own file; empty for a workload of the toolkit's."""


@dataclass(frozen=True)
class _Method:
    """A suite's policy."""

    entry: PolicyEntry
    mark: str | None
    """The fingerprint of its predictor file; None for a policy that takes none."""
    code: str
    """A fingerprint of the user's own file; empty for a policy of the toolkit's."""

    def with_options(self, seed: int) -> PolicyEntry:
        """The entry with a trial's options: the predictor where it takes one, the trial's seed where it draws by one.

        A policy's own draws are chance as the first weights are, and intervals have to hold it too.
        """
        drawn = _parameters(self.entry.name).get("seed")
        by_seed = drawn is not None and drawn.default != seed  # the default has the id that it always had
        own = {"seed": seed} if by_seed else {}
        predictor = {} if self.mark is None else {"predictor": f"{BY_FINGERPRINT}{self.mark}"}
        return replace(self.entry, options={**own, **self.entry.options, **predictor})


def make_plan(suite: Suite, settings: Settings) -> Plan:
    """Check all that a suite names, and list its trials. Trains and writes nothing.

    Raises UsageError or FileFault for a workload, recipe, source, policy, option or predictor file that does not work,
    and for two of them that do not work together.
    """
    device = settings.device_type
    works = {entry.label: _checked(entry) for entry in suite.workloads}
    methods, predictors = {}, {}
    for entry in suite.policies:
        path = _predictor_of(entry, SHIPPED if settings.predictor is None and suite.shipped else settings.predictor)
        mark = None if path is None else fingerprint(path)
        code = "" if entry.name in POLICIES else code_of(policy_class(entry.name))
        method = methods[entry.label] = _Method(entry, mark, code)
        options = dict(method.with_options((entry.seeds or suite.seeds)[0]).options)
        if path is not None and mark is not None:
            predictors[mark] = path
            options["predictor"] = str(path)
        policy = make_policy(entry.name, **options)
        for work in works.values():
            _refuse_unfit(work, entry, policy)

    def config(seed: int, work: _Work, method: _Method) -> TrialConfig:
        recipe = asdict(work.workload.recipe)
        if method.entry.lr_factor != 1.0:
            recipe["lr"] *= method.entry.lr_factor
        return TrialConfig(
            workload=work.entry.name,
            label=work.entry.label,
            family=work.workload.family,
            source=work.workload.source,
            recipe=recipe,
            policy=method.with_options(seed),
            seed=seed,
            device=device,
            slots=settings.sharing,
            scores=suite.scores,
            code={what: each.code for what, each in (("policy", method), ("workload", work)) if each.code},
        )

    trials = (config(seed, works[work.label], methods[policy.label]) for seed, work, policy in suite.cells())
    return Plan(suite, settings, tuple(trials), predictors)


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


def _checked(entry: WorkloadEntry) -> _Work:
    workload = build_workload(entry.name, entry.source, entry.recipe)
    try:
        check_trainable(workload, load_workload(entry.name).source)
    except FileFault:
        raise
    except UsageError as error:
        raise UsageError(f"workload {entry.label!r}: {error}") from error
    return _Work(entry, workload, own_code(entry.name))


def _refuse_unfit(work: _Work, entry: PolicyEntry, policy: FreezePolicy) -> None:
    """Raise UsageError where a workload cannot be trained the way that a policy's entry says."""
    if entry.cache and work.workload.recipe.augment and entry.cache not in UNDER_AUGMENTATION:
        raise UsageError(
            f"policy {entry.label!r} keeps features (cache = {json.dumps(entry.cache)}), and {work.entry.label} "
            f"augments its samples, so that they are never the same: take one of {', '.join(UNDER_AUGMENTATION)}, "
            "leave the cache out, or set augment = false in the recipe"
        )
    if entry.sieve and entry.infobatch:
        raise UsageError(
            f"policy {entry.label!r} lets two methods choose the samples of an epoch (sieve = {entry.sieve}, "
            f"infobatch = {entry.infobatch}): take one of them"
        )
    _refuse_left_out(work, entry, "sieve", entry.sieve)
    _refuse_left_out(work, entry, "infobatch", entry.infobatch)
    if entry.stop and (policy.unfreezes or not policy.freezes):
        raise UsageError(
            f"policy {entry.label!r} stops once all layers are frozen for good (stop = true), and with {entry.name} "
            'they never are: leave it out, or stop at a fixed time with name = "stopped"'
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


def _refuse_left_out(work: _Work, entry: PolicyEntry, name: str, share: float) -> None:
    """Raise UsageError where epochs cannot leave out a share of the samples."""
    if not share:
        return
    recipe = work.workload.recipe
    source = load_source(work.workload.source, train_samples=recipe.train_samples)
    samples = source.size("train")
    if round(share * samples) == 0:
        raise UsageError(
            f"policy {entry.label!r} leaves out no sample of {work.entry.label} ({name} = {share}), which has "
            f"{samples}: give a greater share, or leave it out"
        )
    try:
        steps_per_epoch(source, recipe, share)
    except UsageError as error:
        raise UsageError(f"policy {entry.label!r} ({name} = {share}) on {work.entry.label}: {error}") from error


def _predictor_of(entry: PolicyEntry, given: Path | None) -> Path | None:
    """The predictor file of a policy, read and found good; None for a policy that takes none."""
    if "predictor" not in _parameters(entry.name):
        return None
    named = entry.options.get("predictor")
    if not isinstance(named, str | None):
        raise UsageError(f"policy {entry.label!r}: predictor = {named!r}: give the path of a file, or 'shipped'")
    path = find_predictor(given) if named is None else SHIPPED if named == "shipped" else Path(named)
    load_predictor(path)
    return path


def _parameters(policy: str) -> Mapping[str, inspect.Parameter]:
    """The options that a policy takes."""
    return inspect.signature(policy_class(policy)).parameters
