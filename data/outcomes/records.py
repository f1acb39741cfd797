"""What freezing did: the outcome of each training that went on from one moment, and the files of such outcomes."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.trajectories.folder import GatherFolder
from predictor.errors import DamagedFile, FileFault, UsageError
from predictor.shared.files import written_whole

DEFAULT_FOLDER = Path("runs/outcomes")
DEFAULT_OUTCOMES = Path("runs/outcomes.jsonl")
KINDS = ("unfrozen", "noise", "front", "single")
"""The run itself; a continuation of it with nothing frozen and the samples in another order; one with the first layers
frozen; one with a single layer frozen."""
_STATUSES = ("finished", "diverged")
_MOST = 1 << 53  # of steps and layers, as in a trajectory: beyond it, floating-point progress loses count
_COMMAND = "`python -m collect gather outcomes`"
_CURE = f"gather it again with {_COMMAND}"
_CURE_IF_NEWER = f"update the toolkit, or remove the file and {_CURE}"
Key = tuple[str, int, str, tuple[int, ...]]


@dataclass(frozen=True)
class Result:
    """How a training ended. One that diverged has no loss and no accuracy."""

    status: str
    """finished or diverged."""
    final_loss: float | None = None
    """Mean cross entropy over the test samples."""
    final_accuracy: float | None = None
    """Share of the test samples that are judged right."""
    last_epoch_loss: float | None = None
    """Mean training loss over the last epoch, as it was minimised."""


@dataclass(frozen=True)
class Outcome:
    """A training that went on from one step of a run to the run's end, and how the run itself ended."""

    run_id: str
    """The hash of the run's configuration, as in its trajectory."""
    workload: str
    family: str
    source: str
    seed: int
    kind: str
    """One of KINDS."""
    step: int
    """Optimizer steps that the run itself had done; the layers are frozen from here to the end."""
    total_steps: int
    layers: tuple[int, ...]
    """Places of the frozen layers, front to back, from 0."""
    layer_names: tuple[str, ...]
    """Their names."""
    layer_count: int
    """Layers of the network that may freeze."""
    order_seed: int
    """Seed of the samples' order, of augmentation and of dropout from that step on: the run's, but for noise."""
    flops_share: float
    """FLOPs of an optimizer step with these layers frozen, as a share of a full step's."""
    result: Result
    unfrozen: Result
    """How the run ended with nothing frozen."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the run itself: config, choices, versions and hardware; empty in its continuations."""

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON can say it; `outcome_of` turns it back."""
        return asdict(self)

    @property
    def progress(self) -> float:
        """The share of the training that was done when the layers froze, from 0 to below 1."""
        return self.step / self.total_steps

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.run_id, self.step, self.kind, self.layers

    @property
    def extra_loss(self) -> float:
        """The final test loss less that of the unfrozen run; infinite where this one diverged.

        Raises UsageError for a run that itself diverged: there is nothing to compare with.
        """
        if self.unfrozen.final_loss is None:
            raise UsageError(f"run {self.run_id}: diverged with nothing frozen: leave it out")
        return math.inf if self.result.final_loss is None else self.result.final_loss - self.unfrozen.final_loss


@dataclass(frozen=True)
class OutcomeFolder:
    """What a gathering of outcomes writes: a file a run, logs and what is under way, and beside it the packed file."""

    root: Path = DEFAULT_FOLDER

    def run(self, run_id: str) -> Path:
        """All outcomes of a run that is done."""
        return self._as_trajectories.run(run_id).with_suffix(".jsonl")

    def log(self, run_id: str) -> Path:
        """What the run's process printed."""
        return self._as_trajectories.log(run_id)

    def under_way(self, run_id: str) -> Path:
        """The folder of a run that is being done: its states at the points, and the outcomes so far."""
        return self._as_trajectories.checkpoint(run_id).with_suffix("")

    def state(self, run_id: str, step: int) -> Path:
        """The state of a run after so many steps, from which its continuations go on."""
        return self.under_way(run_id) / f"step-{step}.pt"

    def state_in_use(self, run_id: str) -> Path:
        """The copy of a state that the training of the moment goes on from."""
        return self.under_way(run_id) / "in-use.pt"

    def states(self, run_id: str) -> list[Path]:
        """Every state that there is of a run."""
        return sorted(self.under_way(run_id).glob("*.pt"))

    def so_far(self, run_id: str) -> Path:
        """The outcomes of a run that is being done, each appended when it was known."""
        return self.under_way(run_id) / "outcomes.jsonl"

    @property
    def packed(self) -> Path:
        """The outcomes of all runs in one file."""
        return self.root.with_name(self.root.name + ".jsonl")

    @property
    def _as_trajectories(self) -> GatherFolder:
        return GatherFolder(self.root)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes, one a line, as a whole file or not at all. Raises FileFault when it cannot be written."""
    lines = [json.dumps(outcome.as_dict(), sort_keys=True, allow_nan=False) + "\n" for outcome in outcomes]
    with written_whole(path) as part:
        part.write_text("".join(lines), encoding="utf-8")


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """The outcomes of a file that gather wrote, in its order.

    Raises FileFault, with the line's number, for a line that makes no sense, as a newer version's may to this one, or
    that comes twice; DamagedFile for one that is cut short, and for a file that is empty or no text.
    """
    outcomes: dict[Key, Outcome] = {}
    for number, line in enumerate(_text(path).removesuffix("\n").split("\n"), start=1):
        try:
            outcome = outcome_of(json.loads(line))
            if outcome.key in outcomes:
                raise ValueError(f"run {outcome.run_id}: comes twice with step, kind and layers the same")
        except json.JSONDecodeError as error:
            raise DamagedFile(f"{path}, line {number}: cut short, or not JSON: {_CURE}") from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise FileFault(f"{path}, line {number}: {error}: {_CURE_IF_NEWER}") from error
        outcomes[outcome.key] = outcome
    return tuple(outcomes.values())


def outcome_of(row: Any) -> Outcome:
    """The outcome that a line's object stands for. Raises ValueError where it stands for none."""
    row = _object(row, "the line")
    layers = tuple(_whole(place, "layers") for place in _list(row, "layers"))
    names = tuple(_string({"layer_names": name}, "layer_names") for name in _list(row, "layer_names"))
    parts: dict[str, Any] = {name: _string(row, name) for name in ("run_id", "workload", "family", "source", "kind")}
    for name in ("step", "total_steps", "layer_count"):
        parts[name] = _whole(row.get(name), name)
    for name in ("seed", "order_seed"):  # which torch takes larger ones of, and nobody counts with
        parts[name] = _whole(row.get(name), name, math.inf)
    outcome = Outcome(
        layers=layers,
        layer_names=names,
        flops_share=_needed(row, "flops_share"),
        result=_result(row.get("result"), "result"),
        unfrozen=_result(row.get("unfrozen"), "unfrozen"),
        facts=_object(row.get("facts"), "facts"),
        **parts,
    )
    _check(outcome)
    return outcome


def _check(outcome: Outcome) -> None:
    """Refuse parts that do not fit together."""
    if outcome.kind not in KINDS:
        raise ValueError(f"kind is {outcome.kind!r}, not one of {', '.join(KINDS)}")
    if outcome.step >= outcome.total_steps:
        raise ValueError(f"step is {outcome.step}, and the training has {outcome.total_steps}")
    places = list(outcome.layers)
    if places != sorted(set(places)) or not all(place < outcome.layer_count for place in places):
        raise ValueError(f"layers are {places!r:.60}, not rising places among {outcome.layer_count} layers")
    if len(outcome.layer_names) != len(places):
        raise ValueError(f"{len(outcome.layer_names)} layer_names for {len(places)} layers")
    if bool(places) != (outcome.kind in ("front", "single")):
        raise ValueError(f"{len(places)} frozen layers in an outcome of the kind {outcome.kind!r}")
    if outcome.kind != "unfrozen" and outcome.unfrozen.status != "finished":
        raise ValueError("a continuation of a run that diverged with nothing frozen")


def _result(row: Any, name: str) -> Result:
    row = _object(row, name)
    numbers = {key: _number(row, key) for key in ("final_loss", "final_accuracy", "last_epoch_loss")}
    result = Result(_string(row, "status"), **numbers)
    if result.status not in _STATUSES:
        raise ValueError(f"status is {result.status!r}, not one of {', '.join(_STATUSES)}")
    if (result.status == "finished") != (result.final_loss is not None and result.final_accuracy is not None):
        raise ValueError(f"{name} is {result.status}, with final_loss {result.final_loss}")
    return result


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror}): make it with {_COMMAND}") from error
    except ValueError as error:
        raise DamagedFile(f"{path}: not a text of JSON lines ({error}): {_CURE}") from error
    if not text:
        raise DamagedFile(f"{path}: is empty: {_CURE}")
    return text


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.60}, not an object")
    return value


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r:.60}, not a list")
    return value


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r:.60}, not a name")
    return value


def _whole(value: Any, name: str, most: float = _MOST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        end = f" to {most}" if type(value) is int and value > most else ""
        raise ValueError(f"{name} is {value!r:.60}, not a whole number from 0{end}")
    return value


def _needed(row: Mapping[str, Any], name: str) -> float:
    value = _number(row, name)
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number, or None for null."""
    value = row.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.60}, not a finite number")
    return float(value)
