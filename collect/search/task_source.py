"""Where the task of a search comes from: files and labels, as JSON for the processes that score its folds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.dataset.windows import Rule, outcome_rule, relabelled, windows_from
from data.trajectories.labels import LabelRule
from predictor.training.config import FitConfig, TuneConfig
from predictor.training.search_task import SearchTask
from predictor.training.splits import HeldOut

_LEARN_THRESHOLDS = (0.95, 0.97, 0.99)
_NARROWEST = 3
"""The narrowest window that is tried."""


@dataclass(frozen=True)
class TaskSource:
    """What makes a `SearchTask`."""

    data: tuple[str, ...]
    """Trajectory files or gather folders."""
    outcomes: tuple[str, ...]
    """Outcome files that give the labels. Without, labels come from CKA."""
    label_threshold: float
    label_dip: float
    tolerance: float
    held_out: HeldOut
    config: TuneConfig
    settings: FitConfig

    def read(self) -> SearchTask:
        """Read the files. Raises UsageError as `windows_from` does."""
        if self.outcomes:
            rule: Rule = outcome_rule(self._paths(self.outcomes), self.tolerance, self.held_out)
            windows = windows_from(self._paths(self.data), _NARROWEST, rule, self.held_out)
            labels = {"tolerance": self.tolerance}
            return SearchTask({self.tolerance: windows}, self.tolerance, labels, self.config, self.settings)
        own = self.label_threshold
        windows = windows_from(self._paths(self.data), _NARROWEST, LabelRule(own, self.label_dip), self.held_out)
        others = {
            threshold: relabelled(windows, self._paths(self.data), LabelRule(threshold, self.label_dip), self.held_out)
            for threshold in _LEARN_THRESHOLDS
            if threshold != own
        }
        labels = {"label_threshold": own, "label_dip": self.label_dip}
        return SearchTask({own: windows, **others}, own, labels, self.config, self.settings)

    @property
    def files(self) -> dict[str, str]:
        """All files and folders, by names under which another machine may have them."""
        named = {f"data-{index}{Path(path).suffix}": path for index, path in enumerate(self.data)}
        return named | {f"outcomes-{index}.jsonl": path for index, path in enumerate(self.outcomes)}

    def found_in(self, folder: Path) -> "TaskSource":
        """The same with the files that are below a folder by their names of `files`."""
        where = {path: str(folder / name) for name, path in self.files.items() if (folder / name).exists()}
        data = tuple(where.get(path, path) for path in self.data)
        return replace(self, data=data, outcomes=tuple(where.get(path, path) for path in self.outcomes))

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TaskSource":
        """What `as_dict` returned."""
        held_out = HeldOut(**{name: tuple(values) for name, values in content["held_out"].items()})
        config, settings = TuneConfig(**content["config"]), FitConfig(**content["settings"])
        lists = {name: tuple(content[name]) for name in ("data", "outcomes")}
        return cls(**{**content, **lists, "held_out": held_out, "config": config, "settings": settings})

    @staticmethod
    def _paths(paths: Sequence[str]) -> list[Path]:
        return [Path(path) for path in paths]
