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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tomllib

from collect.hooks.cka import ProbeSpec
from collect.workloads import Recipe, Workload, load_workload, own_code
from predictor.errors import FileFault, UsageError, unknown
from predictor.model.sampling import SampleSpec

SUITES = Path(__file__).parents[1] / "suites"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_ID_LENGTH = 12
Config = TypeVar("Config", Recipe, SampleSpec, ProbeSpec)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's numbers depend on, but for versions and hardware."""

    reference: str
    """What `load_workload` finds the workload by: a name, or the user's package.module:function."""
    workload: Workload
    """With the recipe and the source of this run."""
    seed: int
    """Of the initial weights, the order of the samples, augmentation and dropout."""
    sampling: SampleSpec
    """Which weights are recorded, and when."""
    probe: ProbeSpec
    """What the networks are compared on."""
    code: str = ""
    """A fingerprint of the user's own code of the workload, as it was when the run was planned; empty for a workload
    of the toolkit's."""

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON can say it."""
        return {
            "workload": self.reference,
            "family": self.workload.family,
            "source": self.workload.source,
            "recipe": asdict(self.workload.recipe),
            "seed": self.seed,
            "sampling": asdict(self.sampling),
            "probe": asdict(self.probe),
            **({"code": self.code} if self.code else {}),  # changed code of the user's makes another run
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RunConfig":
        """The configuration that `as_dict` gave."""
        workload = replace(
            load_workload(config["workload"]), source=config["source"], recipe=Recipe(**config["recipe"])
        )
        sampling, probe = SampleSpec(**config["sampling"]), ProbeSpec(**config["probe"])
        return cls(config["workload"], workload, config["seed"], sampling, probe, config.get("code", ""))

    @property
    def id(self) -> str:
        """The run's name: a hash of its configuration, so that the same run is never trained twice."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]

    @property
    def title(self) -> str:
        """What a reader sees: the workload, its source where that is not its own, the seed, and what was changed."""
        own = load_workload(self.reference)
        ours, theirs = asdict(self.workload.recipe), asdict(own.recipe)
        changes = [f"{name}={value}" for name, value in ours.items() if value != theirs[name]]
        source = [] if own.source == self.workload.source else [f"source={self.workload.source}"]
        return " ".join([self.reference, *source, f"seed={self.seed}", *changes])


@dataclass(frozen=True)
class Suite:
    """Runs to gather."""

    name: str
    """What it is called."""
    runs: tuple[RunConfig, ...]
    """In the order in which they start; no two the same."""
    checkpoint_seconds: float
    """Time between a run's checkpoints, from which it goes on when it was broken off."""

    def shard(self, number: int, count: int) -> tuple[RunConfig, ...]:
        """The runs of one of `count` machines, `number` from 1: every count-th, so that each has a bit of all."""
        if not 1 <= number <= count:
            raise UsageError(f"shard {number}/{count}: give i/n with i from 1 to n")
        return self.runs[number - 1 :: count]


def read_suite(name_or_path: str) -> Suite:
    """The suite of a name, or of a file of the user's own. Raises UsageError or FileFault that name what is wrong."""
    path = suite_path(name_or_path)
    try:
        return _suite(tomllib.loads(path.read_text(encoding="utf-8")), path.stem)
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # TOML's and Unicode's errors, and ours from below
        raise FileFault(f"{path}: {error}") from error


def combinations(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values in a table's lists; the first key changes slowest. No list: one combination."""
    values = [value if isinstance(value, list) else [value] for value in table.values()]
    for chosen in itertools.product(*values):
        yield dict(zip(table, chosen, strict=True))


def suite_path(name_or_path: str, suites: Path = SUITES) -> Path:
    """The file of a suite: one of the folder `suites` by its name, or a file of the user's own by its path."""
    own = Path(name_or_path)
    if own.suffix == ".toml" or own.is_file():
        return own
    known = sorted(path.stem for path in suites.glob("*.toml"))
    if name_or_path not in known:
        raise unknown("suite", name_or_path, known, "PATH.toml")
    return suites / f"{name_or_path}.toml"


def _suite(content: dict[str, Any], file_name: str) -> Suite:
    for key in content:
        if key not in ("name", "sampling", "probe", "checkpoint_seconds", "runs"):
            raise unknown("setting", key, ("name", "sampling", "probe", "checkpoint_seconds", "runs"))
    sampling = _built(SampleSpec, content.get("sampling", {}), "sampling")
    probe = _built(ProbeSpec, content.get("probe", {}), "probe")
    blocks = content.get("runs")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        raise UsageError("there are no runs: give at least one [[runs]] table with a workload")
    runs = [_run(table, sampling, probe) for block in blocks for table in combinations(block)]
    if not runs:
        raise UsageError("there are no runs: a list in [[runs]] is empty")
    seconds = _checked("checkpoint_seconds", content.get("checkpoint_seconds", 120.0), float)
    different = {run.id: run for run in runs}
    return Suite(_checked("name", content.get("name", file_name), str), tuple(different.values()), seconds)


def _run(table: dict[str, Any], sampling: SampleSpec, probe: ProbeSpec) -> RunConfig:
    if "workload" not in table:
        raise UsageError("a [[runs]] table without a workload: name at least one")
    reference = _checked("workload", table["workload"], str)
    workload = load_workload(reference)
    seed = _checked("seed", table.get("seed", 0), int)
    if seed < 0:
        raise UsageError(f"seed = {seed}: give a whole number from 0")
    source = _checked("source", table.get("source", workload.source), str)
    changes = {key: value for key, value in table.items() if key not in ("workload", "seed", "source")}
    recipe = _built(Recipe, {**asdict(workload.recipe), **changes}, "runs")
    changed = replace(workload, source=source, recipe=recipe)
    return RunConfig(reference, changed, seed, sampling, probe, own_code(reference))


def _built(kind: type[Config], table: Any, where: str) -> Config:
    """A configuration from a table, every value checked against its field's type."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} = {table!r}: give a table")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    for key in table:
        if key not in known:
            raise UsageError(f"{where}: {unknown('setting', key, known)}")
    return kind(**{key: _checked(key, value, hints[key]) for key, value in table.items()})


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, if it is of the type that `hint` means; a whole number where a float belongs becomes one.

    1 and 1.0 are the same setting, and must give the same run's id.
    """
    kinds = get_args(hint) or (hint,)
    if type(value) is int and int not in kinds and float in kinds:
        return float(value)
    if any(type(value) is kind if isinstance(kind, type) else value == kind for kind in kinds):
        return value
    words = [_WORDS.get(kind) or repr(kind) for kind in kinds if kind is not type(None)]
    raise UsageError(f"{name} = {value!r}: give {' or '.join(words)}")
