"""How a suite is gathered, as the command line takes it. Imports no torch."""

from dataclasses import dataclass

from collect.jobs import THIS_MACHINE, JobOptions
from predictor.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How a suite is gathered. Only the device can change a number."""

    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, ... or mps."""
    slots: int | None = None
    """Runs at once; by default one a CPU core, or up to four a GPU, where its memory holds them."""
    shard: tuple[int, int] = (1, 1)
    """The part of the suite that this machine does, and the number of parts: (2, 8) is the second of eight."""
    jobs: JobOptions = THIS_MACHINE
    """Where the runs execute."""

    def __post_init__(self) -> None:
        from collect.training.device import pick_device

        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots={self.slots}: give the number of runs at once, from 1")
        given = self.jobs.device(self.device)
        if self.jobs.one_machine:
            pick_device(given)  # raises for a device that is not there

    @property
    def chosen_slots(self) -> int | None:
        """Runs at once; None for as many as a cluster has room for."""
        return self.jobs.slots(self.slots, self.device, sharing=True)

    @property
    def at_once(self) -> str:
        """How many runs there are at once, in words."""
        return f"{self.chosen_slots or 'as many as there is room for'} at a time"

    @property
    def device_in_slot(self) -> str:
        """The device as a job sees it. A slot sees one GPU alone, so "cuda:1" is "cuda" there."""
        return self.jobs.device(self.device).partition(":")[0]
