"""A file of settings that `tune` found, as flags of `train`; and whether it may be used beside what is held out."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.errors import FileFault, UsageError

if TYPE_CHECKING:
    from predictor.training.splits import HeldOut

LABEL_FLAGS = ("label_threshold", "label_dip", "learn_threshold")
"""Flags that say how windows are labelled by CKA."""
TOLERANCE_FLAG = "tolerance"
"""The flag that says how they are labelled by outcomes."""
NOTHING = "none"
"""In place of a file: nothing is held out."""


def flags_in(path: Path) -> list[str]:
    """The settings of a file as flags."""
    from predictor.model.network import PredictorConfig
    from predictor.training.fit import FitConfig

    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        known = {
            *LABEL_FLAGS,
            TOLERANCE_FLAG,
            *(field.name for kind in (PredictorConfig, FitConfig) for field in fields(kind)),
        }
        if unknown := sorted(set(settings) - known):
            raise FileFault(f"{path}: no settings of a predictor: {', '.join(unknown)}")
        return [_flag(name, value) for name, value in settings.items() if value is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FileFault):
            raise
        raise FileFault(f"{path}: no settings ({error}): give a file that `python -m predictor tune` wrote") from error


def _flag(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed}={value}"


def check_settings(path: Path, held_out: "HeldOut") -> None:
    """Raise UsageError where the settings of a file were chosen on what is held out: that would be known already."""
    if not held_out.families and not held_out.sources:
        return
    chosen_on = json.loads(path.read_text(encoding="utf-8")).get("chosen_on")
    cure = f"tune again with the same --held-out, or train with --held-out {NOTHING}"
    try:
        seen = held_out.among(chosen_on["families"], chosen_on["sources"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: does not say what its settings were chosen on, as `tune` does: {cure}") from error
    if seen:
        raise UsageError(f"{path}: settings that were chosen on {', '.join(seen)}, which are held out: {cure}")
