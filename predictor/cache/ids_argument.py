"""The feature cache where a trainer calls the model: samples' ids come as one more argument of the call."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from predictor.cache.arguments import checked_ids
from predictor.cache.cut_points import uncompiled
from predictor.cache.feature_cache import FeatureCache
from predictor.cache.hooks import looking
from predictor.controller import FreezeController
from predictor.errors import UsageError

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class IdsArgument:
    """Takes a keyword argument out of the model's calls, and lets its passes in training be a cache's batches.

        ids = IdsArgument(cache, controller, "sample_id")
        loss = model(input_ids=tokens, labels=labels, sample_id=numbers).loss

    is `with cache.batch(numbers)` around that call without the argument, which the model's own `forward` never sees.
    Passes in evaluation mode run as usual, with it or without.

    A pass in training without it raises UsageError. A copy of the model takes the argument out too, and does not use
    the cache.

    Args:
        cache: keeps the features.
        controller: the cache's.
        name: of the argument, which holds a whole number for each sample.
    """

    def __init__(self, cache: FeatureCache, controller: FreezeController, name: str) -> None:
        self._cache = cache
        self._name = name
        self._stack: ExitStack | None = None
        controller.hide_argument(name)
        model = controller.model
        self._handles = [
            model.register_forward_pre_hook(_Before(name, uncompiled(self._begin)), with_kwargs=True),
            model.register_forward_hook(_After(uncompiled(self._end)), always_call=True),
        ]

    def close(self) -> None:
        """Leave the model as it was. The cache stays."""
        for handle in self._handles:
            handle.remove()
        self._end()

    def _begin(self, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end()  # of a pass that was interrupted, for which torch calls no hook
        if ids is None:
            raise UsageError(
                f"the model was called in training without {self._name!r}, by which its samples are known: give each "
                "sample a whole number of its own under this name, and let it through to the model"
            )
        stack = ExitStack()
        try:
            self._cache.enter(stack, checked_ids(ids), args, kwargs)  # whose own passes are in evaluation mode
        except BaseException:
            stack.close()
            raise
        self._stack = stack

    def _end(self) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()


class _Before:
    """Takes the argument out, and begins a pass in training."""

    def __init__(self, name: str, begin: Any) -> None:
        self._name = name
        self._begin = begin

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        rest = {name: value for name, value in kwargs.items() if name != self._name}
        if model.training and not looking():
            self._begin(kwargs.get(self._name), args, rest)
        return args, rest

    def __reduce__(self) -> tuple[Any, ...]:
        return _Before, (self._name, _nothing)


class _After:
    """Ends a pass in training."""

    def __init__(self, end: Any) -> None:
        self._end = end

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and not looking():
            self._end()

    def __reduce__(self) -> tuple[Any, ...]:
        return _After, (_nothing,)


def _nothing(*_: Any) -> None:
    """What a copied model does with ids."""
