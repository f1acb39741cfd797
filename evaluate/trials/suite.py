"""Suite files: which workloads are trained under which policies with which seeds, and how the results are compared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from collect.gather.plan import read_toml, suite_path
from collect.training.state import Scores
from collect.workloads.recipe import Seed
from data.validation import validated
from evaluate.trials.freezing import CacheForm
from evaluate.trials.records import Name, cell_seeds
from predictor.errors import FileFault, unknown

SUITES = Path(__file__).parents[1] / "suites"
_FORBID = ConfigDict(extra="forbid")


def _not_exact(cache: bool | CacheForm) -> bool | CacheForm:
    if cache == "exact":
        raise ValueError("'exact': write true, so that trials with such a cache have one id")
    return cache


def _some_distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise ValueError("give at least one")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{list(seeds)}: give each once")
    return seeds


Seeds = Annotated[tuple[Seed, ...], AfterValidator(_some_distinct)]


@dataclass(frozen=True)
class WorkloadEntry:
    """What is trained: a workload, and what the suite changes of it."""

    __pydantic_config__ = _FORBID

    name: Name
    """A name that `collect.workloads.load_workload` knows."""
    label: Name
    """What tables and plots call it; the name by default."""
    source: str | None = None
    """Another data source than the workload's own."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that are changed."""
    group: str = ""
    """Workloads of one group are also reported together, such as those of one regime of training."""
    seeds: Seeds | None = None
    """The seeds with which it is trained; None for the suite's. Where seeds differ much it needs more of them."""


@dataclass(frozen=True)
class PolicyEntry:
    """What decides about freezing: a policy, its options, and what else of the training it changes."""

    __pydantic_config__ = _FORBID

    name: Name
    """A name that `predictor.policies.make_policy` knows."""
    label: Name
    """What tables and plots call it; the name by default."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The policy's options."""
    cache: Annotated[bool | CacheForm, AfterValidator(_not_exact)] = False
    """Whether the features that the frozen prefix gives for each sample are kept, so that its forward pass is skipped;
    or in which form they are kept (`evaluate.trials.freezing.CacheHook`)."""
    stop: bool = False
    """Whether the training ends once every layer but the head is frozen."""
    lora: Annotated[int, Field(ge=1)] | None = None
    """The rank of the LoRA adapters that are trained in place of the layers; None trains the layers."""
    lr_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What the workload's learning rate is multiplied with: fewer weights want larger steps."""
    probe: bool = field(default=False, kw_only=True)
    """Whether the training starts from a probed head (`predictor.probe_head`)."""
    sieve: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """The share of the training samples that each epoch leaves out, while the easiest and those left out change places
    (`collect.hooks.sieve.Sieve`): epochs are that much shorter, and there are as many."""
    infobatch: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = field(default=0.0, kw_only=True)
    """The share of the samples with a loss below the mean that each epoch leaves out at random, while the others of
    these count more (`collect.hooks.infobatch.InfoBatch`). The training has as many fewer steps as is expected."""
    sparse: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """The share of each layer's weights that masks hold at zero, while they are pruned and grown
    (`collect.hooks.sparse_masks.SparseMasks`)."""
    seeds: Seeds | None = field(default=None, kw_only=True)
    """The seeds with which it is tried, where a workload has them; None for all those of each workload."""

    @property
    def changes(self) -> dict[str, Any]:
        """What the entry changes of a training besides freezing. Only what is set, so that ids of other trials stay."""
        names = ("cache", "stop", "lora", "lr_factor", "probe", "sieve", "sparse", "infobatch")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(type(self), name)}

    @property
    def cache_form(self) -> CacheForm | None:
        """How features are kept; None where they are not."""
        return "exact" if self.cache is True else self.cache or None


@dataclass(frozen=True)
class Suite:
    """A grid of trials. The baseline is trained with every seed of a policy, so that results can be paired."""

    name: str
    """Names the folder of the results too."""
    workloads: tuple[WorkloadEntry, ...]
    policies: tuple[PolicyEntry, ...]
    seeds: tuple[int, ...]
    baseline: str = "none"
    """The label of the policy that every other is compared with."""
    margin: float = 0.005
    """How much accuracy (a share of 1) may be lost and the policy still counts as accurate."""
    scores: Scores = "epoch"
    """When trials are tested: after each epoch, or at the end alone, where a test takes as long as the training."""
    shipped: bool = False
    """Whether it is about the predictor that ships, though another was trained here; one that is given comes first."""

    @property
    def workload_seeds(self) -> dict[str, tuple[int, ...]]:
        """The seeds of each workload that has its own."""
        return {entry.label: entry.seeds for entry in self.workloads if entry.seeds}

    @property
    def policy_seeds(self) -> dict[str, tuple[int, ...]]:
        """Those of each policy that has its own."""
        return {entry.label: entry.seeds for entry in self.policies if entry.seeds}

    def cells(self) -> Iterable[tuple[int, WorkloadEntry, PolicyEntry]]:
        """Every trial's seed, workload and policy, in the order in which they run.

        Policies of the same workload and seed follow each other, so that other load on the machine affects all alike.
        The seed changes slowest, so that an interrupted suite has compared every policy with a few seeds.
        """
        seeds = dict.fromkeys([*self.seeds, *(seed for work in self.workloads for seed in work.seeds or ())])
        grid = ((seed, work, policy) for seed in seeds for work in self.workloads for policy in self.policies)
        return (cell for cell in grid if cell[0] in cell_seeds(self.seeds, cell[1].seeds, cell[2].seeds))


def read_suite(name_or_path: str) -> Suite:
    """The suite of a name, or of a file of the user's own. Raises FileFault or UsageError that names what is wrong."""
    path = suite_path(name_or_path, SUITES)
    content = read_toml(path)
    tables = {key: _as_tables(content[key]) for key in ("workloads", "policies") if key in content}
    return validated(_File, content | tables, str(path), FileFault).suite()


def _as_tables(entries: Any) -> Any:
    """Entries as tables: a name alone stands for one, and is the label unless there is another."""
    if not isinstance(entries, list):
        return entries
    tables = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    return [{"label": str(each.get("name", "")), **each} if isinstance(each, dict) else each for each in tables]


class _File(BaseModel):
    """What a suite's file holds."""

    model_config = _FORBID

    # A folder is called so.
    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    seeds: Seeds
    workloads: tuple[WorkloadEntry, ...]
    policies: tuple[PolicyEntry, ...]
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Of all workloads; their own comes first."""
    baseline: str = "none"
    margin: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.005
    scores: Scores = "epoch"
    predictor: Literal["shipped"] | None = None
    """The one that ships; any other is given with --predictor PATH."""

    @field_validator("workloads", "policies")
    @classmethod
    def _some(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("give at least one")
        return values

    @model_validator(mode="after")
    def _labels(self) -> "_File":
        labels = [entry.label for entry in self.policies]
        for what, known in (("policy", labels), ("workload", [entry.label for entry in self.workloads])):
            twice = next((label for label in known if known.count(label) > 1), None)
            if twice is not None:
                raise ValueError(f"{what} {twice!r} comes twice: give each a label of its own")
        if self.baseline not in labels:
            raise ValueError(f"the baseline must be one of the policies: {unknown('policy', self.baseline, labels)}")
        if next(entry for entry in self.policies if entry.label == self.baseline).seeds:
            raise ValueError(f"the baseline {self.baseline!r} is trained with every seed: give it none of its own")
        return self

    @model_validator(mode="after")
    def _trained(self) -> "_File":
        known = {seed for work in self.workloads for seed in work.seeds or self.seeds}
        for policy in self.policies:
            if odd := sorted(set(policy.seeds or ()) - known):
                raise ValueError(f"policy {policy.label!r}: no workload has seed {odd[0]}: give it to one")
        for work, policy in product(self.workloads, self.policies):
            if not cell_seeds(self.seeds, work.seeds, policy.seeds):
                raise ValueError(
                    f"policy {policy.label!r} has seeds {list(policy.seeds or ())} and workload {work.label!r} "
                    f"{list(work.seeds or self.seeds)}: give them one in common"
                )
        return self

    def suite(self) -> Suite:
        """The suite, each workload with its whole recipe."""
        workloads = tuple(replace(entry, recipe={**self.recipe, **entry.recipe}) for entry in self.workloads)
        shipped = self.predictor == "shipped"
        return Suite(self.name, workloads, self.policies, self.seeds, self.baseline, self.margin, self.scores, shipped)
