"""Progress over many jobs with an estimate of the time left: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm


class JobProgress:
    """Counts finished jobs and the shares of those under way. The estimate assumes that jobs cost alike."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._finished = 0
        self._shares: dict[str, float] = {}
        self._nodes: dict[str, tuple[str, float]] = {}
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total, unit="run", smoothing=0, dynamic_ncols=True, bar_format=_BAR, disable=not _shown()
        )

    def __enter__(self) -> "JobProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, job: str, share: float, node: str = "", gpus: float = 0.0) -> None:
        """Note the share of a job that is done, from 0 to 1, and redraw the bar.

        Args:
            job: Its id.
            share: The share.
            node: The machine of a cluster that it runs on.
            gpus: How many GPUs it has there.
        """
        self._shares[job] = min(max(share, 0.0), 1.0)
        if node:
            self._nodes[job] = node, gpus
        self._redraw()

    def note(self, message: str) -> None:
        """Print a message between the jobs'."""
        if self._bar.disable:
            print(message, flush=True)
        else:
            self._bar.write(message)

    def finish(self, job: str, message: str) -> None:
        """Note that a job has ended, and print `message`."""
        self._shares.pop(job, None)
        self._nodes.pop(job, None)
        self._finished += 1
        count = f"{self._finished:{len(str(self._total))}}/{self._total}"
        if self._bar.disable:
            print(f"{count} {message} ({self._time_left()}{self._where(', ')})", flush=True)
        else:
            self._bar.write(f"{count} {message}")
            self._redraw()

    def _redraw(self) -> None:
        self._bar.n = round(self.done, 2)
        self._bar.set_postfix_str(self._where(), refresh=False)
        self._bar.refresh()

    def _where(self, before: str = "") -> str:
        """The nodes and GPUs in use, behind `before`; nothing on one machine."""
        if not self._nodes:
            return ""
        nodes, gpus = len({node for node, _ in self._nodes.values()}), sum(gpus for _, gpus in self._nodes.values())
        used = f"{nodes} node{'s' * (nodes > 1)}{f' and {gpus:g} GPUs' if gpus else ''}"
        return f"{before}{len(self._nodes)} running on {used}"

    @property
    def done(self) -> float:
        """Finished jobs, and the shares of those under way."""
        return self._finished + sum(self._shares.values())

    def _time_left(self) -> str:
        seconds = time.monotonic() - self._start
        left = seconds / self.done * (self._total - self.done)
        return f"{tqdm.format_interval(seconds)} gone, about {tqdm.format_interval(left)} left"


_BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} {unit}s, {elapsed} gone, about {remaining} left{postfix}"


def _shown() -> bool:
    """Whether there is a terminal to draw a bar on: one that has a size."""
    try:
        return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except OSError:
        return False
