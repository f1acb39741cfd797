"""The hook of a trial that starts from a probed head, and what it records of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import Tensor

from collect.training.loop import Hook, Training
from evaluate.trials.flops import StepFlops
from evaluate.trials.freezing import CacheHook
from predictor.probing.probe import ProbedHead, probe_head


class ProbeHook(Hook):
    """Fits the head to the features of the training samples before the first step (`predictor.probe_head`).

    Samples are not augmented. The pass fills the cache of a prefix that is frozen already. Put it after the CacheHook.

    caching: the trial's hook with the cache, if it has one.
    """

    report: ProbedHead

    def __init__(self, caching: CacheHook | None = None) -> None:
        self._caching = caching

    def on_start(self, training: Training) -> None:
        """Probe the head, or abstain."""
        with training.precision.forward():
            self.report = probe_head(training.model, self._batches(training))

    @property
    def figures(self) -> dict[str, Any]:
        """What the trial's result says of it."""
        return asdict(self.report)

    def flops(self, step_flops: StepFlops) -> int:
        """FLOPs of the passes and of the fit. Passes count as whole ones."""
        return self.report.passed * step_flops.forward // step_flops.samples + self.report.fit_flops

    def _batches(self, training: Training) -> Iterator[tuple[Tensor, Tensor]]:
        size = training.recipe.batch_size
        of_all = training.source.batches("train", size, shuffle=False, device=training.device, among=training.among)
        for ids_B, inputs, labels_B in of_all:
            with self._around(training, ids_B):
                yield training.formatted(inputs), labels_B

    def _around(self, training: Training, ids_B: Tensor) -> AbstractContextManager[None]:
        # Augmented samples are others than these.
        return nullcontext() if self._caching is None or training.recipe.augment else self._caching.cache.batch(ids_B)
