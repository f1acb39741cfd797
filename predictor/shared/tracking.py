"""Logging of figures while a program runs: to a JSON-lines file always, to Weights & Biases if asked for."""

import argparse
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from predictor.errors import UsageError
from predictor.shared.files import append_json_line

Mode = Literal["off", "offline", "online"]
FILE_NAME = "metrics.jsonl"
_PROJECT = "smartfrz"


class Tracker:
    """Writes figures to `metrics.jsonl`, and to a wandb run if there is one.

    A wandb run that fails is dropped with one line on stderr. The program goes on, and its figures are in the file.
    A file that cannot be written raises FileFault.
    """

    def __init__(self, file: Path, run: Any = None) -> None:
        self.file = file
        self._run = run

    def log(self, values: Mapping[str, float | int | str | bool | None], step: int) -> None:
        """Log figures of `step`, which must never fall. A number that is not finite becomes null."""
        row = {name: _finite(value) for name, value in values.items()}
        append_json_line(self.file, {**row, "step": step})
        self._try("logging", lambda run: run.log(row, step=step))

    def close(self) -> None:
        """End the wandb run. Call it once. The file needs no closing."""
        self._try("finishing", lambda run: run.finish())
        self._run = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _try(self, doing: str, call: Any) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            _report_dropped(doing, error, self.file)


def start_tracker(program: str, mode: Mode, directory: Path, config: Mapping[str, Any]) -> Tracker:
    """Start a tracker. Call it once a process, and only in the main one.

    Args:
        program: its name, which is written before the figures.
        mode: "off" does not import wandb. "offline" writes its files under `directory`/wandb for a later `wandb sync`.
            "online" sends them as they come.
        directory: where `metrics.jsonl` is.
        config: the program's settings, of JSON's types. They are written before the figures.

    Raises:
        UsageError: for another mode.
        FileFault: for a file that cannot be written.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"wandb={mode!r}: choose one of {', '.join(get_args(Mode))}")
    file = directory / FILE_NAME
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    append_json_line(file, {"program": program, "started": started, "config": dict(config)})
    if mode == "off":
        return Tracker(file)
    try:
        return Tracker(file, _start_wandb(program, mode, directory, config))
    except Exception as error:
        _report_dropped("starting", error, file)
        return Tracker(file)


def add_wandb_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--wandb off|offline|online`."""
    text = "log to Weights & Biases: not at all, to local files, or to its server (default: %(default)s)"
    parser.add_argument("--wandb", choices=get_args(Mode), default="off", help=text)


def _start_wandb(program: str, mode: Literal["offline", "online"], directory: Path, config: Mapping[str, Any]) -> Any:
    import wandb

    # Console capture and system sampling cost CPU time that would be counted as the training's.
    newer = {"finish_timeout": 120} if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()) else {}
    settings = wandb.Settings(console="off", x_disable_stats=True, silent=mode == "offline", login_timeout=60, **newer)
    return wandb.init(
        project=_PROJECT,
        group=config.get("suite"),  # the shards of a suite, and its repetitions, stand together
        job_type=program,
        mode=mode,
        dir=str(directory),
        config=dict(config),
        settings=settings,
    )


def _finite(value: Any) -> Any:
    """Strict JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report_dropped(doing: str, error: Exception, file: Path) -> None:
    text = f"wandb: {doing} failed ({type(error).__name__}: {error}); going on without it, the figures are in {file}"
    print(text, file=sys.stderr)
