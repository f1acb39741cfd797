"""What can be said of a workload before it is trained: its files, its source, its batches, and what its model takes."""

from collect.training.state import steps_per_epoch
from collect.workloads.recipe import Workload
from data.sources import load_source


def check_trainable(workload: Workload, own_source: str) -> None:
    """Raise UsageError or FileFault, with the cure, where a workload cannot be trained. Trains and writes nothing.

    Args:
        workload: What is to be trained.
        own_source: The source that the workload has by itself. The model is built for any other, which it may not take.
    """
    workload.check_files()
    source = load_source(workload.source, train_samples=workload.recipe.train_samples)
    steps_per_epoch(source, workload.recipe)
    if workload.source != own_source:
        workload.model(source)
