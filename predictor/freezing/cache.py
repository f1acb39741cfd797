"""The frozen front's outputs, kept by sample, so that its forward pass is skipped too."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from predictor.errors import UsageError
from predictor.freezing.controller import FreezeController, FreezeEvent
from predictor.freezing.cut import Cut, best_cut, replayed, trace_calls
from predictor.freezing.store import FeatureStore
from predictor.freezing.tensors import tensors_in

_TOLERANCE = 1e-5


class FeatureCache:
    """Keeps what the frozen front makes of each sample, and skips the front where that is known.

        cache = FeatureCache(controller, memory_gb=4)
        for ids, x, y in loader:                       # each sample has an id
            with cache.batch(ids):                     # a hit skips the frozen front; a miss runs and stores it
                loss = loss_fn(model(x), y)

    The model is left as it is. Inside `batch`, on a hit, modules before the cut return a stand-in of the right shape,
    and the module at the cut returns what was stored; so do others behind it, where a connection leads around them, as
    in a residual block of which only the first layers are frozen. A cut is taken only after a real forward pass gave
    the same outputs as one with the cut, also with another batch in between; the one that skips most is used, and where
    none is right the cache is off and `reason` says why: slower, never wrong. A front that grows is filled from the
    features at the old cut, not from the inputs; a front that shrinks forgets.

    A sample's inputs must be the same each time it comes. Where they are not, as under random augmentation, UsageError
    is raised, unless `check_inputs=False` says that the features of the first time shall stand for all.

    memory_gb: features beyond this go to memory-mapped files. directory: where those are, by default the system's
    temporary folder.
    """

    def __init__(
        self,
        controller: FreezeController,
        *,
        memory_gb: float = 4.0,
        directory: Path | str | None = None,
        check_inputs: bool = True,
    ) -> None:
        if memory_gb < 0:
            raise UsageError(f"memory_gb={memory_gb}: give the gigabytes of memory to use, from 0")
        self.reason = "nothing is frozen yet"
        """Why nothing is skipped; empty while the cache works."""
        self.hits = 0
        """Batches for which the front was skipped."""
        self.misses = 0
        """Batches for which it was run."""
        self.taken: frozenset[int] | None = None
        """Layers that were frozen when the place was found from whose features the last batch's pass began; None where
        it ran as a whole. They are fewer than are frozen while a front that has grown is filled."""
        self._controller = controller
        self._model = controller.model
        self._memory_bytes = int(memory_gb * 1e9)
        self._directory = directory
        self._check_inputs = check_inputs
        self._levels: list[_Level] = []  # the present cut, last; before it the one that it is filled from
        self._stale = True
        self._projections: dict[torch.Size, Tensor] = {}
        controller.on_change(self._front_changed)

    @property
    def cut(self) -> str:
        """The name of the module whose output is kept, the foremost where several are; empty where none is."""
        return self._levels[-1].cut.name if self._levels else ""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of all modules whose outputs are kept, front to back."""
        return self._levels[-1].cut.names if self._levels else ()

    @property
    def bytes(self) -> int:
        """Bytes of features kept, in memory and on the disk."""
        return sum(level.store.bytes for level in self._levels)

    @contextmanager
    def batch(self, ids: Tensor | Iterable[int]) -> Iterator[None]:
        """Within it, call the model once, on the samples with these ids, in their order."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        with ExitStack() as stack:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                handle.remove()  # one pass a batch, and none of the passes made here to find a cut
                self._enter(stack, numbers, args, kwargs)

            handle = self._model.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            yield

    def clear(self) -> None:
        """Forget all features."""
        self._levels = []
        self._stale = True

    def _front_changed(self, event: FreezeEvent) -> None:
        if event.thawed:
            self.clear()
        self._stale = True

    def _enter(self, stack: ExitStack, ids: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arrange for the pass that is about to begin."""
        self.taken = None
        if 0 not in self._controller.frozen:
            self.misses += 1
            return
        prints = self._fingerprints(len(ids), args, kwargs)
        if self._stale:
            self._stale = False
            self._find_cut(len(ids), args, kwargs)
        if not self._levels:
            self.misses += 1
            return
        known = next((level for level in reversed(self._levels) if level.store.holds(ids)), None)
        if known is not None:
            *leaves, prints_then = known.store.get(ids, prints.device)
            self._compare(ids, prints, prints_then)
            stack.enter_context(replayed(known.cut, leaves, len(ids)))
            self.taken = known.frozen
        newest = self._levels[-1]
        if known is newest:
            self.hits += 1
            if len(self._levels) == 2 and len(newest.store) >= len(self._levels[0].store):
                del self._levels[0]
            return
        self.misses += known is None
        self.hits += known is not None
        stack.enter_context(newest.kept(ids, prints, self._give_up))

    def _find_cut(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the cut that skips most among those that change nothing."""
        tried = 0
        with _judging(self._model):
            calls, result = trace_calls(self._model, args, kwargs)

            def right(cut: Cut) -> bool:
                nonlocal tried
                tried += 1
                try:
                    with replayed(cut, cut.leaves(), batch):
                        return _same(result, self._model(*args, **kwargs))
                except RuntimeError:
                    return False  # a stand-in was written to, which it does not allow

            cut = best_cut(calls, batch, right)
            if cut is not None:
                # What modules hand on in plain attributes is that of the batch before: let it be another one's.
                self._model(*_reversed(args, batch), **_reversed(kwargs, batch))
                cut = cut if right(cut) else None
        if cut is not None:
            self._add_level(cut)
            return
        self.clear()
        self._stale = False
        self.reason = (
            f"no place to cut was found: {tried} tried, and each changed the model's output, as skip connections "
            "around the frozen front do"
            if tried
            else "no module ends before the first layer that trains"
        )

    def _add_level(self, cut: Cut) -> None:
        if self._levels and self._levels[-1].cut.names == cut.names:
            return  # the front grew, but not beyond the next place to cut
        leaves = cut.leaves()
        prints_B = torch.empty(len(leaves[0]))
        store = FeatureStore([*leaves, prints_B], self._memory_bytes - self.bytes, self._directory)
        # A front may grow before the features at the last cut are complete: it is filled from where most are known.
        fullest = max(reversed(self._levels), key=lambda level: len(level.store), default=None)
        level = _Level(cut, store, leaves, self._controller.frozen)
        self._levels = [level] if fullest is None else [fullest, level]
        # The outputs seen while looking for the cut have served; only their shapes are needed from here on.
        cut.forget_values()
        self.reason = ""

    def _give_up(self, reason: str) -> None:
        self.clear()
        self._stale = False
        self.reason = reason

    def _fingerprints(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One number a sample that changes when its inputs do: prints_B, float32."""
        prints = None
        for leaf in tensors_in((args, kwargs)):
            if leaf.dim() and leaf.shape[0] == batch:
                flat = leaf.detach().reshape(batch, -1).float()
                part = self._projected(flat)
                prints = part if prints is None else prints + part
        if prints is None:
            raise UsageError(
                f"the model got no tensor with {batch} rows, one for each id: call it inside `cache.batch(ids)` on the "
                "samples that the ids name"
            )
        return prints

    def _projected(self, flat_BK: Tensor) -> Tensor:
        projection_K = self._projection(flat_BK.shape[1:], flat_BK.device)
        if not torch.is_autocast_enabled(flat_BK.device.type):
            return flat_BK @ projection_K
        with torch.autocast(flat_BK.device.type, enabled=False):
            return flat_BK @ projection_K

    def _projection(self, shape: torch.Size, device: torch.device) -> Tensor:
        if shape not in self._projections:
            generator = torch.Generator().manual_seed(0)
            self._projections[shape] = torch.randn(shape, generator=generator).to(device)
        return self._projections[shape].to(device)

    def _compare(self, ids: list[int], prints_B: Tensor, then_B: Tensor) -> None:
        if not self._check_inputs or torch.equal(prints_B, then_B):
            return
        apart_B = (prints_B - then_B).abs() > 1e-3 * (1 + prints_B.abs())
        if bool(apart_B.any()):
            raise UsageError(
                f"sample {ids[int(apart_B.nonzero()[0])]} is not what it was when its features were kept, as under "
                "random augmentation: train without the cache, switch the augmentation off, or say "
                "FeatureCache(..., check_inputs=False) to keep the features of the first time"
            )


class _Level:
    """A cut and the features there."""

    def __init__(self, cut: Cut, store: FeatureStore, expected: list[Tensor], frozen: frozenset[int]) -> None:
        self.cut = cut
        self.store = store
        self.frozen = frozen
        self._expected = expected  # what the first batch gave in evaluation mode, until it was compared

    @contextmanager
    def kept(self, ids: list[int], prints_B: Tensor, give_up: Any) -> Iterator[None]:
        """Within it, the next pass's outputs at the cut are stored."""
        outputs: dict[int, Any] = {}

        def keep(place: int, output: Any) -> None:
            outputs[place] = output
            if len(outputs) == len(self.cut.given):
                leaves = [outputs[place] for place in range(len(outputs))]
                self._store(ids, list(tensors_in(leaves)), prints_B, give_up)

        with ExitStack() as hooks:
            for place, call in enumerate(self.cut.given):
                hooks.callback(call.module.register_forward_hook(_at_call(call.nth, partial(keep, place))).remove)
            yield

    def _store(self, ids: list[int], leaves: list[Tensor], prints_B: Tensor, give_up: Any) -> None:
        if not self.store.fits([*leaves, prints_B]):
            return  # another length or precision than the first batch's: this one is not kept
        if self._expected and not _same(self._expected, leaves):
            give_up(
                "the frozen front gives other features in training than in evaluation: something in it is still in "
                "training mode, such as dropout or BatchNorm outside the frozen layers"
            )
            return
        self._expected = []
        try:
            self.store.put(ids, [*leaves, prints_B])
        except OSError as error:
            give_up(f"features could not be kept: {error.strerror}")


def _at_call(nth: int, act: Callable[[Any], None]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that passes on the output of the module's call number `nth`."""
    calls = itertools.count()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if next(calls) == nth:
            act(output)

    return hook


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """Passes made to find a cut: without gradients, in evaluation mode, and with no trace left."""
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), torch.random.fork_rng(devices=_gpus(model)):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _reversed(inputs: Any, batch: int) -> Any:
    """The inputs with their samples in the reverse order."""

    def turned(leaf: Any) -> Any:
        return leaf.flip(0) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    return tree_map(turned, inputs)


def _same(first: Any, second: Any) -> bool:
    """Whether two outputs hold the same numbers; not, where they hold none that could be compared."""
    leaves = zip(tree_leaves(first), tree_leaves(second), strict=True)
    pairs = [(a, b) for a, b in leaves if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
    return bool(pairs) and all(
        torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(a.abs().max())) for a, b in pairs
    )
