"""What is reported at each freeze: what froze, what a step costs now, and when data loading is the bottleneck."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from predictor.freezing.event import FreezeEvent
from predictor.layers.flops import LayerFlops, count_flops
from predictor.layers.layer import Layer
from predictor.layers.parts import unwrapped

_TIMED_STEPS = 20
"""Steps after a change over which the time spent waiting for data is measured."""
_TOO_LONG = 0.5
"""Share of the time between steps from which data loading is the bottleneck."""


class FreezeReporter:
    """Reports each change in one line, once the next forward pass has shown what the layers cost.

        step 240: froze 0, conv1 (2 of 9 layers frozen): a step takes 81% of a full one's FLOPs, 100% before

    FLOPs are counted in a forward pass of its own, on the inputs of the training's next one, and only when there is
    something to report or `count` was called. Where they cannot be counted, as for a sharded model, lines come without
    them. Of several processes only the first reports, but all count: a `forward` may send to the others and wait for
    them.

    Args:
        model: the model as it is called in the loop.
        layers: its layers.
        say: takes a line. None reports nothing.
        whole: whether `layers` are all of the model's but its head.
        dry_run: whether nothing freezes, so that lines say what would have happened.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        say: Callable[[str], None] | None,
        *,
        whole: bool = True,
        dry_run: bool = False,
    ) -> None:
        self.flops: LayerFlops | None = None
        """What the layers cost; None until it was counted."""
        self.hidden: set[str] = set()
        """Arguments of the model's calls that its own `forward` never sees."""
        self._model = model
        self._layers = layers
        # What the user holds still now costs no gradients, whatever is frozen later.
        self._trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        self._say = say if _is_first() else None
        self._prefix = "dry run, " if dry_run else ""
        self._end = "; only the head still trains" if whole else ""
        self._pending: list[tuple[FreezeEvent, frozenset[int], bool]] = []
        self._counting: RemovableHandle | None = None
        self._uncounted = not any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
        self._data_wait = _DataWait(model)

    @property
    def busy(self) -> bool:
        """Whether the next step must be passed to `stepped`."""
        return bool(self._pending) or self._counting is not None or self._data_wait.running

    def use(self, layers: Sequence[Layer]) -> None:
        """Report on these layers from now on. What has not been reported of others is dropped."""
        self._layers, self.flops = layers, None
        self._pending.clear()

    def count(self) -> None:
        """Count FLOPs at the next forward pass."""
        if self._uncounted and self._counting is None:
            self._counting = _on_forward(self._model, self._count)

    def changed(self, event: FreezeEvent, before: frozenset[int], finished: bool = False) -> None:
        """Report a change of the frozen set.

        Args:
            event: the change.
            before: the frozen set before it.
            finished: whether all layers are frozen for good, so that no further step need come.
        """
        if self._say is None:
            if _are_several():
                self.count()
            return
        self._data_wait.stop()
        if finished and self.flops is not None:
            self._say(self._line(event, before, finished))
            return
        self._pending.append((event, before, finished))
        self.count()

    def stepped(self) -> None:
        """Call after an optimizer step, whose forward pass has shown what layers cost where that can be seen."""
        self._stop_counting()
        if self._say is None:
            return
        for change in self._pending:
            self._say(self._line(*change))
        if self._pending and self.flops is not None:
            self._data_wait.start()
        self._pending.clear()
        share = self._data_wait.stepped()
        if share is not None and share > _TOO_LONG:
            self._say(
                f"data loading has become the bottleneck: {share:.0%} of the last {_TIMED_STEPS} steps' time passed "
                "before their forward passes, and freezing saves none of that: load with more workers, or prepare the "
                "data once"
            )
            self._data_wait.done = True

    def close(self) -> None:
        """Report what is still pending, and stop measuring."""
        self.stepped()
        self._data_wait.stop()

    def _count(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._stop_counting()
        model = unwrapped(self._model)
        if model is not self._model and "forward" in vars(model):
            return  # Lightning redirects one call of the wrapped model, and a pass in here would be that one
        kwargs = {name: value for name, value in kwargs.items() if name not in self.hidden}
        with contextlib.suppress(Exception):  # it is the user's model, and only a figure in a line depends on it
            self.flops = count_flops(model, self._layers, args, kwargs, self._trained)

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.remove()
            self._counting, self._uncounted = None, False

    def _line(self, event: FreezeEvent, before: frozenset[int], finished: bool) -> str:
        changes = [
            f"{word} {self._names(indices)}"
            for word, indices in (("froze", event.froze), ("unfroze", event.unfroze))
            if indices
        ]
        frozen = f"({len(event.frozen)} of {len(self._layers)} layers frozen)"
        line = f"{self._prefix}step {event.step}: {'; '.join(changes)} {frozen}"
        end = self._end if finished else ""
        if self.flops is None:
            return line + end
        now, then = (self.flops.share(frozenset(frozen)) for frozen in (event.frozen, before))
        return f"{line}: a step takes {now:.0%} of a full one's FLOPs, {then:.0%} before{end}"

    def _names(self, indices: tuple[int, ...]) -> str:
        names = [self._layers[index].name for index in indices]
        return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} layers)"


class _DataWait:
    """Measures which share of some steps' time passes between an optimizer step and the next forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.done = False
        """Whether it has been reported, and need not be measured again."""
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
            self._steps = -1  # the current step began before

    def stop(self) -> None:
        """Stop measuring."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def stepped(self) -> float | None:
        """Call after each step. Returns the share of time spent waiting after the last measured step, else None."""
        if self._handle is None:
            return None
        _synchronize(self._model)
        now = time.perf_counter()
        if self._steps < 0:
            self._began, self._waited = now, 0.0
        self._steps += 1
        self._stepped = now
        if self._steps < _TIMED_STEPS:
            return None
        self.stop()
        return self._waited / (now - self._began)

    def _arrived(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._stepped:
            self._waited += time.perf_counter() - self._stepped
            self._stepped = 0.0  # only the first forward pass of a step waited for data


def _synchronize(model: nn.Module) -> None:
    """Wait for the GPU: while it still computes the last step, nothing waits for data."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _Hook:
    """A forward pre-hook that does nothing in a copied or pickled model, and takes nothing along."""

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


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_first() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
