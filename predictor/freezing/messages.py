"""What is reported at each freeze: what froze, what a step costs now, and where steps wait for their inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from predictor.freezing.data_wait import DataWait, Wait
from predictor.freezing.event import FreezeEvent
from predictor.layers.flops import LayerFlops, count_flops
from predictor.layers.isolated_pass import hidden
from predictor.layers.layer import Layer
from predictor.layers.parts import unwrapped
from predictor.layers.pass_hook import FormerHook, PassHook

_TIMED_STEPS = 20
"""Steps after a change over which the wait before forward passes is measured."""
_TOO_LONG = 0.5
"""Share of a step's time from which that wait is the bottleneck."""
_LONGEST_REASON = 200
"""Characters of an error that a line quotes."""


class FreezeReporter:
    """Reports each change in one line, once the next forward pass has shown what the layers cost.

        step 240: froze 0, conv1 (2 of 9 layers frozen): a step takes 81% of a full one's FLOPs, 100% before

    FLOPs are counted in a forward pass of its own, on the inputs of the training's next one, and only when there is
    something to report or `count` was called. Where they cannot be counted, as for a sharded model, lines come without
    them, and one says why. Of several processes only the first reports, but all count: a `forward` may send to the
    others and wait for them.

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
        # What the user holds still costs no gradients until it is opened, whatever is frozen later.
        self._trained = _training_now(model)
        self._say = say if _is_first() else None
        self._prefix = "dry run, " if dry_run else ""
        self._end = "; only the head still trains" if whole else ""
        self._pending: list[tuple[FreezeEvent, frozenset[int], bool]] = []
        self._counting: RemovableHandle | None = None
        sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
        self._uncounted = not sharded
        self._counts_anew = False  # the pass of the step that ends was counted for other layers
        self._why_not = "the model is sharded" if sharded else ""  # counted; empty once it was said
        self._data_wait = DataWait(partial(on_forward, model), model, _TIMED_STEPS)

    @property
    def busy(self) -> bool:
        """Whether the next step must be passed to `stepped`."""
        return bool(self._pending) or self._counting is not None or self._data_wait.running

    def use(self, layers: Sequence[Layer]) -> None:
        """Report on these layers from now on. What has not been reported of others is dropped."""
        counted, self.flops = self.flops is not None, None
        self._layers = layers
        self._pending.clear()
        if counted:
            self._uncounted = self._counts_anew = True
            self.count()

    def withdraw(self) -> None:
        """Report none of the changes so far that are not reported yet."""
        self._pending.clear()

    def count(self) -> None:
        """Count FLOPs at the next forward pass."""
        if self._uncounted and self._counting is None:
            self._counting = on_forward(_network_in(self._model), self._count)

    def state_dict(self) -> dict[str, Any]:
        """What the layers cost, and the names of the parameters that did not train when that was counted.

        A batch of another shape costs otherwise, and a resumed training would count its own first one.
        """
        if self.flops is None:
            return {}
        untrained = [name for name, parameter in self._named_parameters() if id(parameter) not in self._trained]
        return {"flops": self.flops.as_dict(), "untrained": untrained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what a state says, if it says it, and count no more."""
        if "flops" not in state:
            return
        self._stop_counting()
        self.flops, self._uncounted, self._counts_anew = LayerFlops.from_dict(state["flops"]), False, False
        untrained = set(state["untrained"])
        self._trained |= {id(parameter) for name, parameter in self._named_parameters() if name not in untrained}

    def notice_opened(self) -> None:
        """Count anew where the user has opened what was held still when FLOPs were counted."""
        if self.flops is not None and not _training_now(self._model) <= self._trained:
            self.flops, self._uncounted = None, True
            self.count()

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
        if self._counts_anew:
            self._counts_anew = False
            return
        if self._counting is not None and not self._why_not:
            self._why_not = "the model itself is not called, only modules in it"
        self._stop_counting()
        if self._say is None:
            return
        for change in self._pending:
            self._say(self._line(*change))
        if self._pending and self.flops is None and self._why_not:
            self._say(f"{self._prefix}FLOPs are not reported: {self._why_not}")
            self._why_not = ""
        if self._pending and self.flops is not None:
            self._data_wait.start()
        self._pending.clear()
        wait = self._data_wait.stepped()
        if wait is not None and wait.share > _TOO_LONG:
            self._say(_bottleneck(wait))
            self._data_wait.done = True

    def say_at_once(self, line: str) -> None:
        """Report a line of another kind."""
        if self._say is not None:
            self._say(f"{self._prefix}{line}")

    def say(self, lines: Iterable[str]) -> None:
        """Report what is still pending, and then these lines."""
        self._counts_anew = False
        self._stop_counting()
        self.stepped()
        if self._say is not None:
            for line in lines:
                self._say(line)

    def close(self) -> None:
        """Report what is still pending, and stop measuring."""
        self._counts_anew = False
        self._stop_counting()
        self.stepped()
        self._data_wait.stop()

    def _count(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        own = {id(parameter) for parameter in self._model.parameters()}
        if not own.issuperset(id(parameter) for layer in self._layers for parameter in layer.parameters()):
            # As in `torch.func.functional_call`. A later call may be another.
            self._why_not = "the model does not hold its layers' parameters while it is called"
            return
        self._why_not = ""
        self._stop_counting()
        model = unwrapped(_network_in(self._model))
        if model is not self._model and "forward" in vars(model):
            # Lightning redirects one call of the wrapped model, and a pass in here would be that one.
            self._why_not = "the trainer redirects the call of the wrapped model"
            return
        kwargs = {name: value for name, value in kwargs.items() if name not in self.hidden}
        self._trained |= _training_now(self._model)
        try:
            self.flops = count_flops(model, self._layers, args, kwargs, self._trained)
        except Exception as error:  # it is the user's model, and only a figure in a line depends on it
            self._why_not = reason_of(error)

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.remove()
            self._counting, self._uncounted = None, False

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return unwrapped(self._model).named_parameters()

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


def _bottleneck(wait: Wait) -> str:
    """What is said where steps wait for their inputs longer than they compute."""
    share = f"{wait.share:.0%} of a step's time passes between the optimizer's step and the next forward pass"
    if wait.loader_share > _TOO_LONG:
        return (
            f"data loading has become the bottleneck: {share}, most of it in the DataLoader, and freezing saves none "
            "of that: load with more workers, or prepare the data once"
        )
    where = "outside the DataLoader" if wait.loader_seen else "there is no torch DataLoader whose time could be told"
    return (
        f"freezing saves little from here on: {share} ({where}). Look at what runs there: loading and preparing data, "
        "logging, checkpoints"
    )


def reason_of(error: Exception) -> str:
    """An error in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:_LONGEST_REASON].rstrip(": ")


def on_forward(model: nn.Module, callback: Callable[[tuple[Any, ...], Mapping[str, Any]], None]) -> RemovableHandle:
    """Call `callback` with the inputs of each forward pass, until the handle is removed.

    Before all other hooks, and not in the library's own passes but those that show what the training's are like.
    """

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        if not hidden():
            callback(args, kwargs or {})

    return model.register_forward_pre_hook(PassHook(seen), with_kwargs=True, prepend=True)


def _network_in(model: nn.Module) -> nn.Module:
    """What is called on a batch. A LightningModule need not be: its `training_step` may call the network in it."""
    network = unwrapped(model)
    if not hasattr(network, "training_step"):
        return model
    holding = [child for child in network.children() if any(True for _ in child.parameters())]
    only = len(holding) == 1 and not any(True for _ in network.parameters(recurse=False))
    return unwrapped(holding[0]) if only else model


def _training_now(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_first() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


_Hook = _ignore = FormerHook
"""In models that an earlier version has saved."""
