"""What freezing did to a training: one outcome for each continuation of a run, and the files of outcomes."""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from data.outcomes.folder import OutcomeFolder as OutcomeFolder  # its former home
from data.validation import validated
from predictor.errors import DamagedFile, FileFault, UsageError, unknown
from predictor.shared.files import lines_of, written_whole

KINDS = ("unfrozen", "noise", "front", "single")
"""The run itself; a continuation with nothing frozen and the samples in another order; one with a frozen prefix; one
with a single layer frozen."""
_STATUSES = ("finished", "diverged")
_COMMAND = "`python -m collect gather outcomes`"
_CURE = f"gather it again with {_COMMAND}"
_CURE_IF_NEWER = f"update the toolkit, or remove the file and {_CURE}"
Key = tuple[str, int, str, tuple[int, ...]]

_Name = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=0, le=1 << 53)]  # as in a trajectory: beyond it, floating-point progress loses count
_Seed = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Result:
    """How a training ended. One that diverged has no loss and no accuracy."""

    status: _Name
    """finished or diverged."""
    final_loss: FiniteFloat | None = None
    """Mean cross entropy over the test samples."""
    final_accuracy: FiniteFloat | None = None
    """Accuracy on the test samples, from 0 to 1."""
    last_epoch_loss: FiniteFloat | None = None
    """Mean training loss over the last epoch, as it was minimised."""

    def __post_init__(self) -> None:
        if self.status not in _STATUSES:
            raise unknown("status", self.status, _STATUSES)
        if (self.status == "finished") != (self.final_loss is not None and self.final_accuracy is not None):
            raise UsageError(
                f"status={self.status!r} with final_loss={self.final_loss} and final_accuracy={self.final_accuracy}: "
                "give both for a training that finished, and not both for one that diverged"
            )


@dataclass(frozen=True)
class Outcome:
    """A training that continued a run from one of its steps to the run's end, and how the run itself ended.

    Raises UsageError for parts that do not fit together.
    """

    run_id: _Name
    """The hash of the run's configuration, as in its trajectory."""
    workload: _Name
    family: _Name
    source: _Name
    seed: _Seed
    kind: _Name
    """One of KINDS."""
    step: _Count
    """Optimizer steps that the run itself had done. The layers are frozen from here to the end."""
    total_steps: _Count
    layers: tuple[_Count, ...]
    """Indices of the frozen layers, rising."""
    layer_names: tuple[_Name, ...]
    """Their names."""
    layer_count: _Count
    """Number of freezable layers of the network."""
    order_seed: _Seed
    """Seed of the samples' order, of augmentation and of dropout from that step on. The run's own, except for noise."""
    flops_share: FiniteFloat
    """FLOPs of an optimizer step with these layers frozen, as a share of a full step's."""
    result: Result
    unfrozen: Result
    """How the run ended with nothing frozen."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the run itself: config, choices, versions and hardware. Empty in its continuations."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        if self.step >= self.total_steps:
            raise UsageError(f"step={self.step}: give a step before total_steps={self.total_steps}")
        layers = list(self.layers)
        if layers != sorted(set(layers)) or not all(layer < self.layer_count for layer in layers):
            raise UsageError(f"layers={layers!r:.60}: give rising indices below layer_count={self.layer_count}")
        if len(self.layer_names) != len(layers):
            raise UsageError(f"layer_names: {len(self.layer_names)} names for {len(layers)} layers: give one for each")
        if bool(layers) != (self.kind in ("front", "single")):
            raise UsageError(f"kind={self.kind!r} with {len(layers)} frozen layers: only front and single freeze some")
        if self.kind != "unfrozen" and self.unfrozen.status != "finished":
            raise UsageError(f"kind={self.kind!r}: a run that diverged with nothing frozen has no continuations")

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON can represent it. `outcome_of` is the inverse."""
        return asdict(self)

    @property
    def progress(self) -> float:
        """The share of the training that was done when the layers froze, from 0 to below 1."""
        return self.step / self.total_steps

    @property
    def key(self) -> Key:
        """What identifies the outcome: run, step, kind and layers."""
        return self.run_id, self.step, self.kind, self.layers

    @property
    def extra_loss(self) -> float:
        """The final test loss minus that of the unfrozen run. Infinite where this one diverged.

        Raises UsageError for a run that itself diverged.
        """
        if self.unfrozen.final_loss is None:
            raise UsageError(f"run {self.run_id}: diverged with nothing frozen: leave it out")
        return math.inf if self.result.final_loss is None else self.result.final_loss - self.unfrozen.final_loss


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes, one a line, as a whole file or not at all. Raises FileFault when it cannot be written."""
    lines = [json.dumps(outcome.as_dict(), sort_keys=True, allow_nan=False) + "\n" for outcome in outcomes]
    with written_whole(path) as part:
        part.write_text("".join(lines), encoding="utf-8")


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """The outcomes of a file that `gather outcomes` wrote, in its order. It may be packed by gzip.

    Raises:
        DamagedFile: The file is empty, is no text, or has a line that is cut short.
        FileFault: The file cannot be read, or a line does not fit (as a newer version's may not) or comes twice.
    """
    outcomes: dict[Key, Outcome] = {}
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            outcome = outcome_of(json.loads(line), where)
        except json.JSONDecodeError as error:
            raise DamagedFile(f"{where}: cut short, or not JSON: {_CURE}") from error
        except UsageError as error:
            raise FileFault(f"{error}: {_CURE_IF_NEWER}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and deep nesting
            raise FileFault(f"{where}: {error}: {_CURE_IF_NEWER}") from error
        if outcome.key in outcomes:
            raise FileFault(
                f"{where}: run {outcome.run_id}: comes twice with the same step, kind and layers: {_CURE_IF_NEWER}"
            )
        outcomes[outcome.key] = outcome
    return tuple(outcomes.values())


def outcome_of(row: Any, where: str = "outcome") -> Outcome:
    """The outcome that a parsed line represents. Raises UsageError, which begins with `where`, if it does not fit."""
    return validated(Outcome, row, where)


def _lines(path: Path) -> Iterator[str]:
    line = None
    try:
        for line in lines_of(path):
            yield line.removesuffix(b"\n").decode()
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DamagedFile(f"{path}: not a text of JSON lines ({error}): {_CURE}") from error
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror}): make it with {_COMMAND}") from error
    if line is None:
        raise DamagedFile(f"{path}: is empty: {_CURE}")
