"""Fixtures of the tests that collect."""

from collections.abc import Callable

import pytest

from collect.workloads import load_workload
from data.sources import load_source
from data.sources.base import Source, balanced
from data.sources.memory import MemorySource


@pytest.fixture(scope="module")
def source_of() -> Callable[[str], Source]:
    """A few samples of a workload's source."""
    sources: dict[str, Source] = {}

    def load(name: str) -> Source:
        if name not in sources:
            small = load_source(load_workload(name).source, train_samples=40)
            assert isinstance(small, MemorySource)
            test = small.samples["test"]
            small.samples = {**small.samples, "test": test.at(balanced(test.labels, 20))}
            sources[name] = small
        return sources[name]

    return load
