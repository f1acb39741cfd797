"""Suite files: a grid of settings in TOML, and the runs that it stands for.

name = "mine"
[sampling]                  # fields of SampleSpec
snapshots = 60
[probe]                     # fields of ProbeSpec
samples = 80
[[runs]]                    # every combination of the values in lists is a run
workload = ["mlp-digits", "vgg-digits"]
seed = [0, 1, 2]
lr = [0.02, 0.1]            # a field of the recipe; what is not named stays as the workload has it
source = "digits"           # another source than the workload's own
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from collect.hooks.cka import ProbeSpec
from collect.workloads import Recipe, Workload, load_workload, own_code
from collect.workloads.recipe import NotNegative, Seed
from data.validation import validated
from predictor.errors import FileFault, UsageError, unknown
from predictor.model.sampling import SampleSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUITES = Path(__file__).parents[1] / "suites"
_ID_LENGTH = 12


@dataclass(frozen=True)
class RunConfig:
    """All that a run's numbers depend on, but for versions and hardware."""

    reference: str
    """The name that `load_workload` takes, or the user's package.module:function."""
    workload: Workload
    """With the recipe and the source of this run."""
    seed: int
    """Of the initial weights, the order of the samples, augmentation and dropout."""
    sampling: SampleSpec
    """Which weights are recorded, and when."""
    probe: ProbeSpec
    """The inputs and outputs that CKA compares."""
    code: str = ""
    """A fingerprint of the user's own code of the workload, as it was when the run was planned; empty for a workload
    of the toolkit's."""

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return {
            "workload": self.reference,
            "family": self.workload.family,
            "source": self.workload.source,
            "recipe": asdict(self.workload.recipe),
            "seed": self.seed,
            "sampling": asdict(self.sampling),
            "probe": asdict(self.probe),
            **({"code": self.code} if self.code else {}),  # changed code makes another run
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RunConfig":
        """The configuration that `as_dict` returned."""
        workload = replace(
            load_workload(config["workload"]), source=config["source"], recipe=Recipe(**config["recipe"])
        )
        sampling, probe = SampleSpec(**config["sampling"]), ProbeSpec(**config["probe"])
        return cls(config["workload"], workload, config["seed"], sampling, probe, config.get("code", ""))

    @property
    def id(self) -> str:
        """A hash of the configuration: the same run is never trained twice."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]

    @property
    def title(self) -> str:
        """The workload, its source where that is not its own, the seed, and the changed fields of the recipe."""
        own = load_workload(self.reference)
        ours, theirs = asdict(self.workload.recipe), asdict(own.recipe)
        changes = [f"{name}={value}" for name, value in ours.items() if value != theirs[name]]
        source = [] if own.source == self.workload.source else [f"source={self.workload.source}"]
        return " ".join([self.reference, *source, f"seed={self.seed}", *changes])


@dataclass(frozen=True)
class Suite:
    """Runs to gather."""

    name: str
    """The suite's name."""
    runs: tuple[RunConfig, ...]
    """In the order in which they start; no two the same."""
    checkpoint_seconds: float
    """Time between a run's checkpoints."""

    def shard(self, number: int, count: int) -> tuple[RunConfig, ...]:
        """The runs of one of `count` machines, with `number` from 1: every count-th run of the suite."""
        if not 1 <= number <= count:
            raise UsageError(f"shard {number}/{count}: give i/n with i from 1 to n")
        return self.runs[number - 1 :: count]


def read_suite(name_or_path: str) -> Suite:
    """Read the suite of a name, or of a file of the user's own.

    Raises:
        UsageError: An unknown name.
        FileFault: A file that cannot be read, or whose content makes no sense; names the key and the value.
    """
    path = suite_path(name_or_path)
    return _suite(read_toml(path), path)


def combinations(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values in a table's lists; the first key changes slowest. No list: one combination."""
    values = [value if isinstance(value, list) else [value] for value in table.values()]
    for chosen in itertools.product(*values):
        yield dict(zip(table, chosen, strict=True))


def suite_path(name_or_path: str, suites: Path = SUITES) -> Path:
    """The path of a suite: the name of one in the folder `suites`, or the path of a user's own file."""
    own = Path(name_or_path)
    if own.suffix == ".toml" or own.is_file():
        return own
    known = sorted(path.stem for path in suites.glob("*.toml"))
    if name_or_path not in known:
        raise unknown("suite", name_or_path, known, "PATH.toml")
    return suites / f"{name_or_path}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a suite's file. Raises FileFault for one that cannot be read, or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise FileFault(f"{path}: {error}") from error


class _SuiteFile(BaseModel):
    """A suite file, but for the keys of its [[runs]]."""

    model_config = ConfigDict(extra="forbid")
    name: str = ""
    checkpoint_seconds: NotNegative = 120.0
    sampling: SampleSpec = SampleSpec()
    probe: ProbeSpec = ProbeSpec()
    runs: list[dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class _Row(Recipe):
    """One combination of a [[runs]] table: the recipe's fields, and what else a run is made of."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    workload: str = ""
    seed: Seed = 0
    source: str = ""


def _suite(content: dict[str, Any], path: Path) -> Suite:
    file = validated(_SuiteFile, content, str(path), FileFault)
    runs = [
        _run(row, file, f"{path}: runs[{index}]")
        for index, table in enumerate(file.runs)
        for row in combinations(table)
    ]
    if not runs:
        raise FileFault(f"{path}: there are no runs: a list in [[runs]] is empty")
    different = {run.id: run for run in runs}
    return Suite(file.name or path.stem, tuple(different.values()), file.checkpoint_seconds)


def _run(row: dict[str, Any], file: _SuiteFile, where: str) -> RunConfig:
    reference = row.get("workload")
    if not isinstance(reference, str):
        raise FileFault(f'{where}: workload={reference!r}: name a workload, such as "mlp-digits"')
    try:
        workload = load_workload(reference)
    except UsageError as error:
        raise FileFault(f"{where}: {error}") from error
    whole = validated(_Row, {**asdict(workload.recipe), "source": workload.source, **row}, where, FileFault)
    recipe = Recipe(**{field.name: getattr(whole, field.name) for field in fields(Recipe)})
    changed = replace(workload, source=whole.source, recipe=recipe)
    return RunConfig(reference, changed, whole.seed, file.sampling, file.probe, own_code(reference))
