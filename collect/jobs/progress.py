"""Progress over many jobs with an estimate of the time left: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm


class JobProgress:
    """Counts finished jobs and the shares of those under way. The estimate assumes that jobs cost alike."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._finished = 0
        self._shares: dict[str, float] = {}
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total, unit="run", smoothing=0, dynamic_ncols=True, bar_format=_BAR, disable=not _shown()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, job: str, share: float) -> None:
        """The share of a job that is done, from 0 to 1."""
        self._shares[job] = min(max(share, 0.0), 1.0)

    def finish(self, job: str, message: str) -> None:
        """A job has ended; `message` is its line in the output."""
        self._shares.pop(job, None)
        self._finished += 1
        count = f"{self._finished:{len(str(self._total))}}/{self._total}"
        if self._bar.disable:
            print(f"{count} {message} ({self._time_left()})", flush=True)
        else:
            self._bar.write(f"{count} {message}")

    def refresh(self) -> None:
        """Redraw the bar."""
        self._bar.n = round(self.done, 2)
        self._bar.refresh()

    @property
    def done(self) -> float:
        """Jobs done, those under way counted by their shares."""
        return self._finished + sum(self._shares.values())

    def _time_left(self) -> str:
        seconds = time.monotonic() - self._start
        left = seconds / self.done * (self._total - self.done)
        return f"{tqdm.format_interval(seconds)} gone, about {tqdm.format_interval(left)} left"


_BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} {unit}s, {elapsed} gone, about {remaining} left"


def _shown() -> bool:
    """Whether there is a terminal to draw a bar on: one that has a size."""
    try:
        return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except OSError:
        return False
