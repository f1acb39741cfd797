"""Trying where a model can be cut, by passes in evaluation mode that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from predictor.cache.cut_points import Call, Cut, best_cut, keepable, replayed, trace_calls
from predictor.cache.level import at_call, same
from predictor.errors import UsageError

_FEW = 8
"""Samples on which places to cut are tried. The one that is chosen is tried once more on the whole batch."""


def look_passes(batch: int) -> float:
    """About how many passes forward on a whole batch it takes to find a cut: two, and a dozen on a few samples."""
    return 2 + 12 * min(_FEW / batch, 1)


class Search(NamedTuple):
    """What came of looking for a place to cut."""

    cut: Cut | None
    reason: str
    """Why there is none; else empty."""
    samples: int
    """Samples in all passes that it took."""


def proven_cut(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Search:
    """The cut that skips most among those that change nothing; or None where there is none, and why.

    args, kwargs: of a call of the model on `batch` samples. The cut holds that call's outputs.
    """
    with _judging(model):
        if batch <= _FEW or not _rows_alone(args, kwargs, batch):
            looking = _Looking(model, args, kwargs, batch)
            return Search(looking.best(), looking.reason, looking.samples)
        some_args, some_kwargs = _rows((args, kwargs), batch, list(range(_FEW)))
        few = _Looking(model, some_args, some_kwargs, _FEW)
        cut = few.best()
        if cut is None:
            return Search(None, few.reason, few.samples)
        whole = _Looking(model, args, kwargs, batch)
        model(*some_args, **some_kwargs)  # another batch in between
        cut = whole.proved(cut) or whole.best()
        return Search(cut, whole.reason, few.samples + _FEW + whole.samples)


class _Looking:
    """A pass of the model on some samples, and cuts tried against what it gave."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> None:
        self._model, self._args, self._kwargs, self._batch = model, args, kwargs, batch
        self._calls, self._result = trace_calls(model, args, kwargs)
        self._tried = 0
        self._found = False
        self.samples = batch

    @property
    def reason(self) -> str:
        """Why no cut was found; empty where one was."""
        if self._found:
            return ""
        if not self._tried:
            return "no module ends before the first layer that trains"
        return (
            f"no place to cut was found: {self._tried} tried, and each changed the model's output, as skip connections "
            "around the frozen front do"
        )

    def best(self) -> Cut | None:
        """The best cut that is right, also with another batch in between."""
        cut = best_cut(self._calls, self._batch, self._right)
        if cut is None:
            return None
        # What modules hand on in plain attributes is that of the batch before: let it be another one's.
        turned = list(range(self._batch))[::-1]
        args, kwargs = _rows((self._args, self._kwargs), self._batch, turned)
        self._model(*args, **kwargs)
        self.samples += self._batch
        self._found = self._right(cut)
        return cut if self._found else None

    def proved(self, cut: Cut) -> Cut | None:
        """A cut that was found on other samples, with these samples' outputs; None where it is not right for them."""
        known = {(call.name, call.nth): call for call in self._calls}
        parts = [[known.get((call.name, call.nth)) for call in calls] for calls in (cut.given, cut.skipped)]
        given, skipped = (tuple(call for call in calls if call is not None) for calls in parts)
        own = Cut(given, skipped, self._batch)
        self._found = all(map(all, parts)) and all(map(keepable(self._batch), given)) and self._right(own)
        return own if self._found else None

    def _right(self, cut: Cut) -> bool:
        self._tried += 1
        self.samples += self._batch
        try:
            with replayed(cut, cut.leaves(), self._batch):
                return same(self._result, self._model(*self._args, **self._kwargs))
        except Exception:
            return False  # a stand-in was written to, which it does not allow, or the model itself refuses its NaN


def _rows_alone(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> bool:
    """Whether all tensors that the model is called with have a row for each sample, so that some can be left out."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return all(tensor.dim() and tensor.shape[0] == batch for tensor in tensors)


def called_part(model: nn.Module, part: nn.Module | None) -> nn.Module:
    """What a cache is for: this part of the model, or the model.

    Raises UsageError for a part of something else, and for a model in pieces on several machines: each would have to
    run the front as often.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UsageError(
            "a sharded model (FSDP2) is put together by all processes at once, and a cache that knows other samples in "
            "each would leave some of them waiting: use DDP with the cache, or FSDP2 without"
        )
    if part is not None and all(part is not module for module in model.modules()):
        raise UsageError(
            f"model={type(part).__name__}: this is no part of the {type(model).__name__} that the controller freezes: "
            "give the controller's model or a module in it"
        )
    return model if part is None else part


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
