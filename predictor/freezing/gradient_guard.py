"""Watches the gradients of frozen layers: none may move them, and what the user opens is the user's."""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from predictor.freezing.freeze import trains
from predictor.freezing.messages import on_forward
from predictor.layers.layer import Layer


class GradientGuard:
    """Watches the gradients of frozen parameters. A step in which none arrives costs nothing.

    Each parameter has a hook that runs in the backward pass once a gradient has been accumulated for it, which takes a
    `requires_grad_(True)` in the user's code. A parameter that trained until it froze may not move: the hook drops that
    gradient before any optimizer sees it. A parameter that the user had held still is the user's to open: its gradient
    stays, and the layer with it.

    Args:
        dropped: called with a layer's index at each gradient that was dropped.
        opened: called with the index of a layer that the user has opened, at each gradient. Both are held weakly: when
            their owner is gone, so is the guard, and the parameters are the user's again.
    """

    def __init__(self, dropped: Callable[[int], None], opened: Callable[[int], None]) -> None:
        self._dropped: weakref.WeakMethod[Callable[[int], None]] = weakref.WeakMethod(dropped)
        self._opened: weakref.WeakMethod[Callable[[int], None]] = weakref.WeakMethod(opened)
        self._handles: dict[int, list[RemovableHandle]] = {}
        self.held_still: dict[int, list[nn.Parameter]] = {}
        """By layer, what the user held still of it when it froze."""
        self.trained: dict[int, list[nn.Parameter]] = {}
        """By layer, what trained until it froze; its modules may come to hold other parameters."""
        self._before_pass: RemovableHandle | None = None

    def guard(self, index: int, layer: Layer) -> None:
        """Guard a layer that is about to freeze."""
        resting = self.held_still[index] = [parameter for parameter in layer.parameters() if not trains(parameter)]
        drop = partial(_drop_gradient, self._dropped, self._opened, index, resting)
        note = partial(_note_opening, self._opened, index)
        self.trained[index] = [parameter for parameter in layer.parameters() if trains(parameter)]
        self._handles[index] = [_hook(parameter, drop) for parameter in self.trained[index]]
        self._handles[index] += [_hook(parameter, note) for parameter in resting if _can_train(parameter)]

    def opened(self, index: int) -> bool:
        """Whether the user has opened a layer: something in it requires a gradient that did not when it froze."""
        return index in self._handles and any(parameter.requires_grad for parameter in self.held_still[index])

    @property
    def may_be_opened(self) -> bool:
        """Whether there is something that the user may open."""
        return any(self.held_still[index] for index in self._handles)

    @property
    def whole_layer_rests(self) -> bool:
        """Whether the user held one of the layers still as a whole when it froze."""
        return any(self.held_still[index] and not self.trained[index] for index in self._handles)

    def hold_before_passes(self, model: nn.Module) -> None:
        """Switch off before each pass of the model what the loop has switched on: no gradient is computed for it then.

        Adapters are switched in every step where a model is its own reference.
        """
        if self._before_pass is None:
            self._before_pass = on_forward(model, self._hold)

    def _hold(self, *_: object) -> None:
        if self._dropped() is None:
            return
        for index in self._handles:
            if not self.opened(index):
                for parameter in self.trained[index]:
                    parameter.requires_grad_(False)

    def drop_gradients(self, but: Collection[int]) -> list[int]:
        """Drop the gradients of all guarded layers but those that the user has opened. Returns which had any."""
        had = []
        for index in self._handles:
            if index in but or self.opened(index):
                continue
            held = (*self.trained[index], *self.held_still[index])
            parameters = [parameter for parameter in held if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None
            had += [index] if parameters else []
        return had

    def leave(self, index: int) -> None:
        """Guard a layer no more, and forget it."""
        self._unhook([index])
        self.held_still.pop(index, None)
        self.trained.pop(index, None)

    def close(self) -> None:
        """Guard nothing any more. What it knows of the layers stays."""
        self._unhook(list(self._handles))

    def _unhook(self, indices: Iterable[int]) -> None:
        for index in indices:
            for handle in self._handles.pop(index, ()):
                handle.remove()
        if self._before_pass is not None and not self._handles:
            self._before_pass.remove()
            self._before_pass = None


def _hook(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    # PyTorch takes such a hook only while the parameter requires a gradient, and keeps it afterwards.
    required = parameter.requires_grad
    parameter.requires_grad_(True)
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(required)
    return handle


def _can_train(parameter: nn.Parameter) -> bool:
    """Whether a parameter could require a gradient. Quantized ones cannot."""
    return parameter.is_leaf and (parameter.is_floating_point() or parameter.is_complex())


def _drop_gradient(
    dropped: "weakref.WeakMethod[Callable[[int], None]]",
    opened: "weakref.WeakMethod[Callable[[int], None]]",
    index: int,
    resting: Sequence[nn.Parameter],
    parameter: Tensor,
) -> None:
    if any(other.requires_grad for other in resting):  # the whole layer is the user's now
        _note_opening(opened, index, parameter)
    elif (report := dropped()) is not None:
        parameter.grad = None
        report(index)


def _note_opening(opened: "weakref.WeakMethod[Callable[[int], None]]", index: int, parameter: Tensor) -> None:
    if (report := opened()) is not None:
        report(index)
