"""Trying where a model can be cut, by passes in evaluation mode that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from predictor.caching.cut import Call, Cut, best_cut, replayed, trace_calls
from predictor.caching.level import at_call, same


def proven_cut(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> tuple[Cut | None, str]:
    """The cut that skips most among those that change nothing; or None where there is none, and why.

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
            turned = list(range(batch))[::-1]
            model(*_rows(args, batch, turned), **_rows(kwargs, batch, turned))
            cut = cut if right(cut) else None
    if cut is not None:
        return cut, ""
    if not tried:
        return None, "no module ends before the first layer that trains"
    return None, (
        f"no place to cut was found: {tried} tried, and each changed the model's output, as skip connections "
        "around the frozen front do"
    )


def run_front(
    model: nn.Module, cut: Cut, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, places: list[int]
) -> None:
    """Run the model up to the cut, on the samples at these places of a batch, for those that watch it there.

    args, kwargs: of a call of the model on `batch` samples.
    """
    last = max(cut.given, key=lambda call: call.end)
    handle = last.module.register_forward_hook(at_call(last.nth, _enough))
    try:
        with _judging(model):
            model(*_rows(args, batch, places), **_rows(kwargs, batch, places))
    except _Enough:
        pass
    finally:
        handle.remove()


class _Enough(BaseException):
    """Ends a pass whose rest nobody needs. No Exception, which a model might catch."""


def _enough(_: Any) -> None:
    raise _Enough


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


def _rows(inputs: Any, batch: int, places: list[int]) -> Any:
    """The inputs of the samples at these places of a batch, in that order."""

    def some(leaf: Any) -> Any:
        return leaf[places] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    return tree_map(some, inputs)
