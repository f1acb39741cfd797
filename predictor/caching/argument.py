"""The feature cache where somebody else calls the model: samples' ids come as one more argument of the call."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from predictor.caching.cache import FeatureCache
from predictor.caching.cut import uncompiled
from predictor.caching.store import numbers_of
from predictor.errors import UsageError


class IdsArgument:
    """Takes a keyword argument out of the model's calls, and lets its passes in training be a cache's batches.

        ids = IdsArgument(cache, model, "sample_id")
        loss = model(input_ids=tokens, labels=labels, sample_id=numbers).loss

    is `with cache.batch(numbers)` around that call without the argument, which the model's own `forward` never sees.
    Passes in evaluation mode run as ever, with it or without.

    model: what the cache's controller freezes. name: the argument, a whole number a sample. A pass in training without
    it raises UsageError.
    """

    def __init__(self, cache: FeatureCache, model: nn.Module, name: str) -> None:
        self._cache = cache
        self._name = name
        self._stack: ExitStack | None = None
        self._handles = [
            model.register_forward_pre_hook(uncompiled(self._before), with_kwargs=True),
            model.register_forward_hook(uncompiled(self._after), always_call=True),
        ]

    def close(self) -> None:
        """Leave the model as it was. The cache stays."""
        for handle in self._handles:
            handle.remove()
        self._end()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rest = {name: value for name, value in kwargs.items() if name != self._name}
        # Passes within a pass are the cache's own, and are in evaluation mode.
        if model.training:
            if self._name not in kwargs:
                raise UsageError(
                    f"the model was called without {self._name!r}, by which its samples are known: give each sample a "
                    f"whole number of its own under this name, and let it through to the model"
                )
            self._end()
            self._stack = ExitStack()
            self._cache.enter(self._stack, numbers_of(kwargs[self._name]), args, rest)
        return args, rest

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training:
            self._end()

    def _end(self) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
