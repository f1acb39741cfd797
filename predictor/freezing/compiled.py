"""What `torch.compile` made of a model, and has to make again for each frozen set."""

import re
import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

from predictor.layers.parts import unwrapped

_MOST_CHANGES = 20
"""How often the frozen set of a compiled model changes in a training. Compiling takes seconds to minutes."""


class CompiledCode:
    """The compiled code that runs a model: discards it when the frozen set changes, and lets that happen not too often.

    Compiled code was made for one pattern of gradients. PyTorch recompiles for a few other patterns and then falls back
    to eager for good; until 2.11 it even goes on computing gradients of frozen weights.

    Only this model's code is discarded: that of its modules' `forward`, and that of functions which were compiled for
    an object of one of its classes, such as a compiled training step. Compiled losses and other models stay. A model
    that shares its classes with another one, as a student with its teacher, takes that one along. All compiled code of
    the process goes where CUDA graphs were made of it (`mode="reduce-overhead"`), whose memory is returned by no other
    means, and where PyTorch is built otherwise than this library knows it.

    Args:
        model: as it is called in the loop.
        total_steps: optimizer steps of the whole training.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        self._model = model
        self._distance = total_steps // _MOST_CHANGES
        self._changed_at: int | None = None
        self._kept_back: frozenset[int] = frozenset()

    def forget(self, event: object = None) -> None:
        """Discard the code, so that the model is compiled for what trains now."""
        if "torch._dynamo" not in sys.modules:  # otherwise nothing was compiled, and its import is slow
            return
        trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
        if getattr(getattr(trees, "local", None), "tree_manager_containers", None):
            torch.compiler.reset()
            trees.reset_cudagraph_trees()
            return
        try:
            codes = list(_codes_of(self._model))
        except (AttributeError, ImportError, TypeError):
            torch.compiler.reset()
            return
        from torch._dynamo.eval_frame import remove_from_cache

        for code in codes:
            remove_from_cache(code)

    def begin_anew(self) -> None:
        """Count changes from the start: those so far are undone."""
        self._changed_at, self._kept_back = None, frozenset()

    def state_dict(self) -> dict[str, Any]:
        """When the frozen set last changed, and what is kept back since then."""
        return {"changed_at": self._changed_at, "kept_back": sorted(self._kept_back)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what a state says, if it says it."""
        if state:
            self._changed_at, self._kept_back = state["changed_at"], frozenset(state["kept_back"])

    def hold_back(self, wanted: frozenset[int], frozen: frozenset[int], step: int) -> frozenset[int]:
        """What may be frozen now of what a policy wants, which never unfreezes: nothing more soon after a change.

        The rest is kept back until a later decision.
        """
        wanted |= self._kept_back
        soon = self._changed_at is not None and step - self._changed_at < self._distance
        if wanted != frozen and soon and self._is_compiled():
            self._kept_back = wanted
            return frozen
        self._kept_back = frozenset()
        if wanted != frozen:
            self._changed_at = step
        return wanted

    def _is_compiled(self) -> bool:
        if "torch._dynamo" not in sys.modules:
            return False
        try:
            return any(True for _ in _codes_of(self._model))
        except (AttributeError, ImportError, TypeError):
            return type(self._model).__name__ == "OptimizedModule"


def _codes_of(model: nn.Module) -> Iterator[CodeType]:
    """The code objects of which something was compiled for a model.

    Raises:
        AttributeError, ImportError, TypeError: PyTorch has other private parts than 2.6 to 2.14.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.convert_frame import input_codes

    forwards = {getattr(getattr(module, "forward", None), "__code__", None) for module in model.modules()}
    kinds = {type(module) for module in unwrapped(model).modules()}
    own = {kind for kind in kinds if not kind.__module__.startswith("torch.")} or kinds
    numbers = {str(id(kind)) for kind in own}  # a guard on an object names its class by this number
    for code in [code for reference in input_codes.seen if (code := reference()) is not None]:
        entries = _debug_get_cache_entry_list(code)
        guards = (str(entry.guard_manager) for entry in entries)
        if entries and (code in forwards or any(not numbers.isdisjoint(re.findall(r"\d+", text)) for text in guards)):
            yield code
