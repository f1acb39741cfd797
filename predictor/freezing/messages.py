"""What the user is told at each freeze: what froze, what a step costs now, and when data loading is the bound."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from predictor.layers.flops import LayerFlops, count_flops
from predictor.layers.layer import Layer
from predictor.layers.parts import unwrapped

_WATCHED_STEPS = 20
"""Steps after a change over which it is seen how long the training waits for data."""
_TOO_LONG = 0.5
"""Share of the time between steps from which data loading is the bound."""


class Change(Protocol):
    """What is told of: a FreezeEvent."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def froze(self) -> tuple[int, ...]:
        """Places of the layers that froze."""

    @property
    def thawed(self) -> tuple[int, ...]:
        """Places of the layers that train again."""

    @property
    def frozen(self) -> tuple[int, ...]:
        """Places of all layers frozen from here on."""


class Teller:
    """Tells of each change in one line, once the next forward pass has shown what the layers cost.

        step 240: froze 0, conv1 (2 of 9 layers frozen): a step takes 81 % of a full one's FLOPs, 100 % before

    FLOPs are counted in a forward pass of its own, on the inputs of the training's next one, and only when there is
    something to tell or `count` was asked for. Where that cannot be, as for a sharded model, lines come without them.

    model: as it is called in the loop. say: takes a line; None tells nothing. Where there are several processes, the
    first alone speaks, but all count, also those with nothing to say: a `forward` may send to the others and wait for
    them. whole: whether `layers` are all of the model's but its head.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], say: Callable[[str], None] | None, whole: bool = True
    ) -> None:
        self.flops: LayerFlops | None = None
        """What the layers cost; None until it was counted."""
        self._model = model
        self._layers = layers
        self._say = say if _is_first() else None
        self._open: list[tuple[Change, frozenset[int], bool]] = []
        self._end = "; only the head still trains" if whole else ""
        self._counting: RemovableHandle | None = None
        self._uncounted = not any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
        self._waiting = _Waiting(model)
        self.hidden: set[str] = set()
        """Arguments of the model's calls that its own `forward` never sees."""

    @property
    def busy(self) -> bool:
        """Whether there is something to tell, or to find out, at the next step."""
        return bool(self._open) or self._counting is not None or self._waiting.running

    def count(self) -> None:
        """Count FLOPs at the next forward pass."""
        if self._uncounted and self._counting is None:
            self._counting = _on_forward(self._model, self._count)

    def changed(self, event: Change, before: frozenset[int], finished: bool = False) -> None:
        """The frozen set has become another than `before`. finished: for good, so that no further step need come."""
        if self._say is None:
            if _several():
                self.count()
            return
        self._waiting.stop()
        if finished and self.flops is not None:
            self._say(self._line(event, before, finished))
            return
        self._open.append((event, before, finished))
        self.count()

    def stepped(self) -> None:
        """An optimizer step has been done, and its forward pass has been seen where that can be."""
        self._forget_counting()
        if self._say is None:
            return
        for change in self._open:
            self._say(self._line(*change))
        if self._open and self.flops is not None:
            self._waiting.start()
        self._open.clear()
        share = self._waiting.stepped()
        if share is not None and share > _TOO_LONG:
            self._say(
                f"data loading has become the bound: {share:.0%} of the last {_WATCHED_STEPS} steps' time went by "
                "before their forward passes, and freezing saves none of that: load with more workers, or prepare the "
                "data once"
            )
            self._waiting.done = True

    def close(self) -> None:
        """Tell what is left to tell."""
        self.stepped()
        self._waiting.stop()

    def _count(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._forget_counting()
        model = unwrapped(self._model)
        if model is not self._model and "forward" in vars(model):
            return  # Lightning leads one call of the wrapped model elsewhere, and a pass in here would be that one
        kwargs = {name: value for name, value in kwargs.items() if name not in self.hidden}
        with contextlib.suppress(Exception):  # it is somebody's model, and no more than a figure hangs on it
            self.flops = count_flops(model, self._layers, args, kwargs)

    def _forget_counting(self) -> None:
        if self._counting is not None:
            self._counting.remove()
            self._counting, self._uncounted = None, False

    def _line(self, event: Change, before: frozenset[int], finished: bool) -> str:
        changes = [
            f"{word} {self._named(places)}"
            for word, places in (("froze", event.froze), ("thawed", event.thawed))
            if places
        ]
        line = f"step {event.step}: {'; '.join(changes)} ({len(event.frozen)} of {len(self._layers)} layers frozen)"
        end = self._end if finished else ""
        if self.flops is None:
            return line + end
        now, then = (self.flops.share(frozenset(frozen)) for frozen in (event.frozen, before))
        return f"{line}: a step takes {now:.0%} of a full one's FLOPs, {then:.0%} before{end}"

    def _named(self, places: tuple[int, ...]) -> str:
        names = [self._layers[place].name for place in places]
        return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} layers)"


class _Waiting:
    """How much of some steps' time passes between an optimizer step and the next forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.done = False
        """Whether it has been told, and need not be measured again."""
        self._model = model
        self._handle: RemovableHandle | None = None
        self._began = self._stepped = self._waited = 0.0
        self._steps = 0

    @property
    def running(self) -> bool:
        """Whether steps are measured now."""
        return self._handle is not None

    def start(self) -> None:
        """Measure the steps from the next one on."""
        if not self.done:
            self._handle = _on_forward(self._model, self._arrived)
            self._steps = -1  # the one under way began before

    def stop(self) -> None:
        """Measure no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def stepped(self) -> float | None:
        """Call after each step. At the end of the last that is watched: the share of their time spent waiting."""
        if self._handle is None:
            return None
        _finish(self._model)
        now = time.perf_counter()
        if self._steps < 0:
            self._began, self._waited = now, 0.0
        self._steps += 1
        self._stepped = now
        if self._steps < _WATCHED_STEPS:
            return None
        self.stop()
        return self._waited / (now - self._began)

    def _arrived(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._stepped:
            self._waited += time.perf_counter() - self._stepped
            self._stepped = 0.0  # only the first forward pass of a step has waited


def _finish(model: nn.Module) -> None:
    """Wait for a GPU's queue: while it is still at the last step, nobody waits for data."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _Hook:
    """A forward pre-hook that a copied or pickled model leaves behind, with all that it holds."""

    def __init__(self, callback: Callable[[tuple[Any, ...], Mapping[str, Any]], None]) -> None:
        self._callback = callback

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._callback(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_ignore,)


def _on_forward(model: nn.Module, callback: Callable[[tuple[Any, ...], Mapping[str, Any]], None]) -> RemovableHandle:
    """Call `callback` with the inputs of each forward pass, until the handle is removed.

    Before all other hooks: those of a feature cache make passes of their own, which are not the training's.
    """
    return model.register_forward_pre_hook(_Hook(callback), with_kwargs=True, prepend=True)


def _ignore(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Does nothing."""


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_first() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
