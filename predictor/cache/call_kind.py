"""What a model's calls were like when features were kept: another kind of call runs as if there was no cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from predictor.cache.arguments import Arguments, Layout, same_values

SameFeatures = Callable[[Sequence[Any]], bool]
"""Whether features of now are those that come with these other shared arguments."""


class CallKind:
    """Shapes and types of the arguments, the values that all samples share, and autocast."""

    def __init__(self) -> None:
        self.layout: Layout = ()
        """Of the first call; empty before it."""
        self._kinds: list[Any] = []
        self._shared: list[Any] | None = None
        self._shared_too: list[Any] = []  # the last other values of theirs that give the same features
        self._shared_not: list[Any] = []  # and the last ones that do not
        self._devices: list[str] = []  # the kinds of device that the model is on
        self._autocast: list[Any] = []
        self._precisions: list[str] | None = None  # of autocast when features were kept; None where a state lacks it

    def begin(self, model: nn.Module, arguments: Arguments, layout: Layout) -> None:
        """Take the kind of this call, with which features begin to be kept."""
        self.layout, self._kinds = layout, arguments.kind(layout)
        self._shared, self._shared_too, self._shared_not = _own(arguments.shared(layout)), [], []
        self._take_autocast(model)

    def note_autocast(self, model: nn.Module) -> bool:
        """Take autocast as it is now. Returns whether a loaded state's features were kept in the same precision."""
        before = self._precisions
        self._take_autocast(model)
        return before is None or before == self._precisions

    def _take_autocast(self, model: nn.Module) -> None:
        self._devices = sorted({"cpu", *(weight.device.type for weight in model.parameters())} - {"meta"})
        self._autocast = _autocast(self._devices)
        self._precisions = sorted({str(dtype) for dtype in self._autocast if dtype is not None})

    def why_other(self, arguments: Arguments, batch: int, same_features: SameFeatures | None, loaded: bool) -> str:
        """How a call differs from this kind, in words; empty where it does not.

        Args:
            arguments: what the model is called with.
            batch: samples in it.
            same_features: sees whether other shared arguments matter; None where nothing is kept yet to compare with.
            loaded: whether what is kept comes from a state, and has not been used yet.
        """
        if loaded and not self.layout:  # a state that does not hold it
            self.layout = next(iter(arguments.layouts(batch)), ())
        if not loaded and self._autocast != _autocast(self._devices):
            return "autocast is switched on or off, unlike when features were kept"
        if len(arguments.leaves) != len(self.layout):
            return "the model is called with another number of arguments than when features were kept"
        if arguments.samples(self.layout) != {batch} or arguments.kind(self.layout) != self._kinds:
            return "inputs of another shape than the first batch's, as by padding"
        shared = arguments.shared(self.layout)
        if self._shared is None:
            self._shared = _own(shared)
        if same_values(shared, self._shared) or same_values(shared, self._shared_too):
            return ""
        if same_features is None:
            return "an argument of the model has another value than when features were kept"
        if not same_values(shared, self._shared_not) and same_features(self._shared):
            self._shared_too = _own(shared)
            return ""
        self._shared_not = _own(shared)
        return "features depend on an argument of the model that has another value than when they were kept"

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, tensors, lists of them. Of autocast its precision, which is the same on all devices."""
        layout, precisions = list(self.layout), self._precisions
        return {"kind": self._kinds, "layout": layout, "shared": self._shared, "autocast": precisions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the kind that a state holds."""
        self._kinds, self.layout, self._shared = state["kind"], tuple(state.get("layout", ())), state.get("shared")
        self._precisions = state.get("autocast")


def _autocast(devices: list[str]) -> list[Any]:
    return [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in devices]


def _own(values: list[Any]) -> list[Any]:
    """Copies of arguments, for the caller may write to them."""
    return [each.detach().clone() if isinstance(each, Tensor) else each for each in values]
