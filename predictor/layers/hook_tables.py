"""Hooks that a model's own code installs in its first pass, as Transformers' models do to collect hidden states."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context after which modules have no hooks that were added in it.

    A model that notes in an attribute that its hooks are there would install them twice, once that is restored.
    """
    tables = [getattr(module, name) for module in modules for name in ("_forward_hooks", "_forward_pre_hooks")]
    before = [(table, set(table)) for table in tables]
    try:
        yield
    finally:
        for table, keys in before:
            for key in table.keys() - keys:
                del table[key]
