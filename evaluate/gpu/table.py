"""The checks' lines in the terminal, and their table as Markdown with the machine that they are of."""

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tabulate import tabulate

_NAME_WIDTH = 14


@dataclass(frozen=True)
class Row:
    """The result of one check."""

    name: str
    about: str
    """What is checked."""
    status: str
    """ok, FAILED or skipped."""
    figures: str
    """What was measured, what is wrong, or why it was skipped."""
    seconds: float

    @property
    def line(self) -> str:
        """The row in the terminal."""
        return f"{self.name:{_NAME_WIDTH}} {self.status:7} {self.figures} ({self.seconds:.0f} s)"


def markdown(device: str, rows: Sequence[Row]) -> str:
    """The table, under the facts of the machine."""
    cells = [(row.name, row.about, row.status, _escaped(row.figures), f"{row.seconds:.0f}") for row in rows]
    table = tabulate(cells, ("check", "what", "", "figures", "seconds"), tablefmt="pipe", disable_numparse=True)
    return f"# What holds on a GPU\n\n`python -m evaluate gpu`: {_facts(device)}.\n\n{table}\n"


def _facts(device: str) -> str:
    from collect.training.provenance import provenance

    found = provenance()
    hardware, versions = found["hardware"], found["versions"]
    gpu = f"{hardware['gpu']}, driver {_driver()}, CUDA {hardware['cuda']}" if device != "cpu" else "no GPU"
    machine = f"{gpu}; {hardware['cpu']}, {hardware['cores']} cores"
    return f"{machine}; PyTorch {versions['torch']}, Python {versions['python']}; {found['made'][:10]}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    return "unknown"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
