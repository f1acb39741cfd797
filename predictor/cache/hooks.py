"""Hooks of the user's own on modules: they have to see each pass of a training, and none that is made here."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as everywhere

_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "lightning",
    "pytorch_lightning",
    "predictor",
    "contextlib",
)
"""Whose hooks may miss a pass: they move tensors or switch gradients on, and keep nothing that they see. Those of
contextlib are what is left of this library's hooks in a copy."""
_OBSERVERS = ("torch.ao", "torch.quantization")
"""Parts of them whose hooks keep statistics."""
_looking: list[nn.Module] = []
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether a module has a hook of the user's own, forward or backward."""
    return any(_is_own(hook) for table in _tables(module) for hook in table.values())


def all_are_watched() -> bool:
    """Whether a hook of the user's own is on all modules there are."""
    return any(_is_own(hook) for name in _TABLES for hook in getattr(everywhere, f"_global{name}", {}).values())


def number_of_hooks(module: nn.Module) -> int:
    """How many hooks a module has."""
    return sum(map(len, _tables(module)))


def looking() -> bool:
    """Whether the present pass is one of the cache's own, by which it looks for something."""
    return bool(_looking)


@contextmanager
def without_own_hooks(model: nn.Module) -> Iterator[None]:
    """Within it, passes of the model do not call hooks of the user's own.

    But for those before the model itself, which torch may be about to call.
    """
    present = model._forward_pre_hooks
    tables = [table for module in model.modules() for table in _tables(module) if table is not present]
    tables = [table for table in tables if any(map(_is_own, table.values()))]
    before = [dict(table) for table in tables]
    _looking.append(model)
    for table in tables:
        for number in [number for number, hook in table.items() if _is_own(hook)]:
            del table[number]
    try:
        yield
    finally:
        _looking.pop()
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def _is_own(hook: Callable[..., Any]) -> bool:
    owner = getattr(hook, "__module__", "") or ""
    return owner.partition(".")[0] not in _LIBRARIES or owner.startswith(_OBSERVERS)


def _tables(module: nn.Module) -> list[MutableMapping[int, Callable[..., Any]]]:
    return [module.__dict__[name] for name in _TABLES if module.__dict__.get(name)]
