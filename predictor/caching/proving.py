"""Trying where a model can be cut, by passes in evaluation mode that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from predictor.caching.cut import Call, Cut, best_cut, replayed, trace_calls
from predictor.caching.level import same


def proven_cut(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> tuple[Cut | None, int]:
    """The cut that skips most among those that change nothing, or None where there is none; and how many were tried.

    args, kwargs: of a call of the model on `batch` samples. The cut holds that call's outputs.
    """
    tried = 0
    with _judging(model):
        calls, result = trace_calls(model, args, kwargs)

        def right(cut: Cut) -> bool:
            nonlocal tried
            tried += 1
            try:
                with replayed(cut, cut.leaves(), batch):
                    return same(result, model(*args, **kwargs))
            except RuntimeError:
                return False  # a stand-in was written to, which it does not allow

        cut = best_cut(calls, batch, right)
        if cut is not None:
            # What modules hand on in plain attributes is that of the batch before: let it be another one's.
            model(*_reversed(args, batch), **_reversed(kwargs, batch))
            cut = cut if right(cut) else None
    return cut, tried


def seen_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Every module call of a pass, outputs kept."""
    with _judging(model):
        return trace_calls(model, args, kwargs)[0]


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """Passes within it are without gradients, in evaluation mode, and leave no trace."""
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), torch.random.fork_rng(devices=gpus_of(model)):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def gpus_of(model: nn.Module) -> list[int]:
    """The numbers of the CUDA devices that hold the model's parameters."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _reversed(inputs: Any, batch: int) -> Any:
    """The inputs with their samples in the reverse order."""

    def turned(leaf: Any) -> Any:
        return leaf.flip(0) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    return tree_map(turned, inputs)
