"""Finding where to cut a model: passes in evaluation mode that leave no trace, and what they prove."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from predictor.cache.arguments import Arguments, Inputs, Layout
from predictor.cache.cut_points import (
    Call,
    Cut,
    Key,
    Replay,
    TensorForm,
    at_call,
    form_of,
    replayed,
    trace_calls,
    versions_of,
)
from predictor.cache.hooks import is_watched, without_own_hooks
from predictor.cache.side_effects import kept_in, left_by
from predictor.cache.stand_ins import stand_ins_in
from predictor.cache.watch import COMPARED, read
from predictor.errors import UsageError
from predictor.layers.isolated_pass import isolated
from predictor.layers.tensors import tensors_anywhere_in, tensors_in

_FEW = 8
"""Samples on which cuts are tried, at most. The one that is chosen is tried once more on the whole batch."""
_REPEATED = 1e-5
"""Two passes on the same batch may differ by this share of the largest number, and by two steps of short types."""
_ROUNDED = {"cpu": 1e-3}
"""The same for a sample in batches of different sizes, for which libraries take other kernels."""
_ROUNDED_ELSEWHERE = 1e-2  # GPUs round the factors of convolutions to 10 bits
_ROUNDED_HALF = 5e-2
_HALF = (torch.float16, torch.bfloat16)


def look_passes(batch: int) -> float:
    """About how many passes forward on a whole batch it takes to find a cut: two, and a dozen on a few samples."""
    return 2 + 12 * min(_FEW / batch, 1)


class Search(NamedTuple):
    """The result of looking for a cut."""

    cut: Cut | None
    layout: Layout
    """Which dimensions of the arguments are that of the samples."""
    rows: list[Tensor]
    """The batch's features at the cut, samples first."""
    reason: str
    """Why there is no cut; else empty."""
    samples: int
    """Samples in all passes that it took."""
    modules: list[nn.Module]
    """Those that run before the features are there, and all that these are parts of."""


def find_cut(
    model: nn.Module, arguments: Arguments, batch: int, layouts: Sequence[Layout], needed: Container[Key] = ()
) -> Search:
    """Find the cut that skips most among those that change nothing, for a call of the model on `batch` samples.

    layouts: what the arguments' dimensions may mean, the likeliest first. The first one for which every output of the
    frozen prefix has rows that depend on their own sample is taken, or else the one for which most have. needed: calls
    of which the training has read what they return, and which are not to be skipped.
    """
    samples, scores = 0, []
    for layout in layouts:
        with _Probe(model, arguments, layout, batch) as probe:
            if probe.consistent or len(layouts) == 1:
                return probe.search(samples, needed)
        samples += probe.samples
        scores.append(probe.score)
    best = [layout for layout, score in zip(layouts, scores, strict=True) if score == max(scores)]
    if any(a != b and None not in (a, b) for other in best for a, b in zip(best[0], other, strict=True)):
        return Search(None, best[0], [], _AMBIGUOUS, samples, [])
    with _Probe(model, arguments, best[0], batch) as probe:
        return probe.search(samples, needed)


def find_again(
    model: nn.Module, arguments: Arguments, batch: int, layout: Layout, given: Sequence[Any], skipped: Sequence[Any]
) -> Search:
    """Find the cut that was found in another run, among the calls of a pass.

    given, skipped: keys of its calls. Raises UsageError where the pass has no such calls, as that of another model.
    """
    with _Probe(model, arguments, layout, batch) as probe:
        return probe.find([(name, nth) for name, nth in given], [(name, nth) for name, nth in skipped])


def prefix_outputs(
    model: nn.Module,
    cut: Cut,
    inputs: Inputs,
    modes: bool = False,
    copies: bool = False,
    attributes: Iterable[tuple[dict[str, Any], str, Any]] = (),
) -> list[Any]:
    """Run the model up to the cut and no further. Returns what the given calls return.

    modes: leave modules in the modes that they are in; by default they are in evaluation mode. copies: copy what they
    return at once, before the model's code may write to it. attributes: other values for attributes of modules, each
    with the module's `vars` and a name.
    """
    outputs: dict[int, Any] = {}

    def note(index: int) -> Callable[[Any], None]:
        def act(output: Any) -> None:
            outputs[index] = tree_map_only(Tensor, Tensor.clone, output) if copies else output
            if len(outputs) == len(cut.given):
                raise _Enough

        return act

    args, kwargs = inputs
    training = [module for module in model.modules() if module.training] if modes else []
    with traceless(model), ExitStack() as hooks:
        for module in training:
            module.training = True
        for table, name, value in attributes:
            table[name] = value
        for index, call in enumerate(cut.given):
            hooks.callback(call.module.register_forward_hook(at_call(call.nth, note(index))).remove)
        with suppress(_Enough):
            model(*args, **kwargs)
    return [outputs.get(index) for index in range(len(cut.given))]


class _Enough(BaseException):
    """Ends a pass whose rest is not needed. Not an Exception, which a model might catch."""


class _Probe:
    """Three passes of a model that show what its calls depend on, and the states in which cuts are tried.

    One on a few samples, one on the whole batch, and one on the few again, from another random state and from whatever
    state the model has kept of the batch in between. A call whose outputs for the few samples differ is random or
    depends on other batches. One whose rows for the whole batch differ from those for the few depends on other samples.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, layout: Layout, batch: int) -> None:
        self._model, self._arguments, self._layout, self._batch = model, arguments, layout, batch
        # In another order, and less than all: what depends on the batch shows.
        self._few = list(range(min(_FEW, batch - 1)))[::-1]
        self._hooked = [name for name, module in model.named_modules() if name and is_watched(module)]
        self._training = [module for module in model.modules() if module.training]
        self.calls: list[Call] = []
        self.samples = 0
        self._broken = ""
        self._faults: dict[Call, str] = {}
        self._few_outputs: dict[Call, Any] = {}
        self._result: Any = None
        self._few_result: Any = None
        self._few_left: dict[Any, list[Tensor]] = {}
        self._result_fits = False
        self._tried = 0
        self._before_whole, self._before_few = ExitStack(), ExitStack()

    def __enter__(self) -> "_Probe":
        self._before_whole.enter_context(traceless(self._model))
        try:
            first, _ = self._trace(self._some())
            self._before_few.enter_context(traceless(self._model, seed=2))
            whole, self._result = self._trace(self._all())
            with traceless(self._model, seed=1):
                before = kept_in(self._model)
                again, self._few_result = self._trace(self._some())
                self._few_left = left_by(self._model, before)
        except Exception as error:
            self._broken = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return self
        except BaseException:
            self.__exit__()
            raise
        self.samples = 2 * len(self._few) + self._batch
        self._compare(first, whole, again)
        return self

    def __exit__(self, *_: object) -> None:
        self._before_few.close()
        self._before_whole.close()

    @property
    def consistent(self) -> bool:
        """Whether all that modules return, and the model's result, has rows that depend on their own sample alone."""
        return not self._broken and _MIXED not in self._faults.values() and self._result_fits

    @property
    def score(self) -> tuple[int, bool]:
        """How many calls have such rows, and whether the result has."""
        return -1 if self._broken else sum(map(self._keepable, self.calls)), self._result_fits

    def search(self, samples: int, needed: Container[Key]) -> Search:
        """Look for the best cut. samples: in passes that were made before. needed: calls that are not to be skipped."""
        hooked = next((name for name in self._hooked for call in whole_calls(self.calls) if _within(name, call)), None)
        if hooked is not None:
            self._before_few.close()
            return self._found(
                None, f"module {hooked!r} has a forward hook, or a backward one, which has to see each pass"
            )
        cut = None if self._broken else best_cut(self.calls, self._keepable, self._right_for_few)
        self._before_few.close()
        self.samples += samples
        if cut is None:
            return self._found(None, self._reason())
        if not self._right_for_all(cut):
            return self._found(None, f"the cut at {cut.name!r} is right for a few samples, not for the whole batch")
        read = [call for call in cut.skipped if call.key in needed]
        while read or (read := self._read_in_training(cut)):
            if not all(map(self._keepable, read)):
                return self._found(None, READ)
            given = sorted((*cut.given, *read), key=lambda call: call.start)
            cut = Cut(tuple(given), tuple(call for call in cut.skipped if call not in read))
            if not self._right_for_all(cut):
                return self._found(None, READ)
            read = []
        return self._found(cut)

    def find(self, given: list[tuple[str, int]], skipped: list[tuple[str, int]]) -> Search:
        """Look for the cut at the calls with these keys."""
        if self._broken:
            return self._found(None, self._reason())
        known = {call.key: call for call in self.calls if call.form is not None}
        odd = next((name for name, nth in (*given, *skipped) if (name, nth) not in known), None)
        if odd is not None:
            raise UsageError(f"this state is of a model that calls its module {odd!r}, which this one does not")
        cut = Cut(tuple(known[key] for key in given), tuple(known[key] for key in skipped))
        fault = next((fault for call in cut.given if (fault := self._faults[call])), "")
        return self._found(None if fault else cut, fault)

    def _found(self, cut: Cut | None, reason: str = "") -> Search:
        rows = None if cut is None else cut.rows([call.output for call in cut.given])
        return Search(cut, self._layout, rows or [], reason, self.samples, [] if cut is None else self._before(cut))

    def _before(self, cut: Cut) -> list[nn.Module]:
        end = max(call.end for call in cut.given)
        called = [call.module for call in self.calls if call.start < end]
        parts = [part for call in (*cut.given, *cut.skipped) for part in call.module.modules()]
        return list(dict.fromkeys([self._model, *called, *parts]))

    def _compare(self, first: list[Call], whole: list[Call], again: list[Call]) -> None:
        earlier, later = ({call.key: call for call in calls} for calls in (first, again))
        self.calls = whole
        for call in whole:
            one, other = earlier.get(call.key), later.get(call.key)
            if one is None or other is None:
                self._faults[call] = _UNSTEADY
                continue
            form = form_of(call.output, self._batch, other.output, len(self._few))
            call.form = form if form is not None and form.is_plain else None
            self._few_outputs[call] = other.output
            self._faults[call] = self._fault(call, one, other)
        form = form_of(self._result, self._batch, self._few_result, len(self._few))
        by_sample = form is not None and any(isinstance(leaf, TensorForm) and any(leaf.slope) for leaf in form.leaves)
        self._result_fits = by_sample and self._rows_alike(self._result, self._few_result)

    def _fault(self, call: Call, one: Call, other: Call) -> str:
        if call.drew or not close(one.output, other.output, repeated):
            return _UNSTEADY
        for each in (call, other):
            if versions_of(list(tensors_in(each.output))) != each.versions:
                return _WRITTEN
        if call.form is None or not self._rows_alike(call.output, other.output):
            return _MIXED
        return "" if call.form.batch_dims is not None else _NO_ROWS

    def _rows_alike(self, whole: Any, few: Any) -> bool:
        """Whether the few samples have the same rows in both; what has no dimension for samples is left out."""
        form = form_of(whole, self._batch, few, len(self._few))
        if form is None:
            return False
        for kind, a, b in zip(form.leaves, tree_leaves(whole), tree_leaves(few), strict=True):
            if isinstance(a, Tensor) and any(kind.slope):
                if kind.batch_dim is None:
                    return False
                rows = a.index_select(kind.batch_dim, torch.tensor(self._few, device=a.device))
                if not close(rows, b, rounding):
                    return False
        return True

    def _keepable(self, call: Call) -> bool:
        return self._faults.get(call) == ""

    def _right_for_few(self, cut: Cut) -> bool:
        self._tried += 1
        rows = cut.rows([self._few_outputs[call] for call in cut.given])
        return self._right(cut, rows, self._some(), len(self._few), self._few_result, self._few_left, seed=1)

    def _right_for_all(self, cut: Cut) -> bool:
        rows = cut.rows([call.output for call in cut.given])
        return self._right(cut, rows, self._all(), self._batch, self._result, {}, seed=2)

    def _right(
        self,
        cut: Cut,
        rows: list[Tensor] | None,
        inputs: Any,
        batch: int,
        result: Any,
        left: dict[Any, list[Tensor]],
        seed: int,
    ) -> bool:
        """Whether a pass from the cut gives this result and leaves these tensors in the modules."""
        self.samples += batch
        args, kwargs = inputs
        try:
            with traceless(self._model, seed), replayed(cut, rows or [], batch) as replay:
                before = kept_in(self._model)
                output = self._model(*args, **kwargs)
                fits = not _read_by(replay, output) and same(result, output)
                found = left_by(self._model, before) if fits and left else {}
                return fits and all(key in found and close(left[key], found[key], repeated) for key in left)
        except Exception:
            return False  # the model refuses the NaN that it has read

    def _read_in_training(self, cut: Cut) -> list[Call]:
        """The skipped calls on which something depends in a pass in the modes of the training.

        Not where others train too: such a pass may wait for them, as in a SyncBatchNorm.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return []
        self.samples += len(self._few)
        rows = cut.rows([self._few_outputs[call] for call in cut.given])
        args, kwargs = self._some()
        with traceless(self._model, seed=1), replayed(cut, rows or [], len(self._few)) as replay:
            for module in self._training:
                module.training = True
            with suppress(Exception):  # of NaN, or of too few samples for a BatchNorm: what was read till then counts
                _read_by(replay, self._model(*args, **kwargs))
        return [cut.skipped[number] for number in sorted(replay.skipped.read)]

    def _trace(self, inputs: Inputs) -> tuple[list[Call], Any]:
        return trace_calls(self._model, *inputs)

    def _some(self) -> Inputs:
        return self._arguments.rows(self._layout, self._few)

    def _all(self) -> Inputs:
        return self._arguments.copied()

    def _reason(self) -> str:
        if self._broken:
            return (
                "the model does not run without gradients, in evaluation mode, on a part of the batch, and so nothing "
                f"can be proved of its features ({self._broken})"
            )
        if self._tried:
            return (
                f"no place to cut was found: {self._tried} tried, and each changed the model's output, as skip "
                "connections around the frozen prefix do, or what its modules keep for others to read"
            )
        faults = {self._faults[call] for call in whole_calls(self.calls)}
        return next((fault for fault in (_UNSTEADY, _MIXED, _NO_ROWS, _WRITTEN) if fault in faults), _NO_CALL)


READ = "the model reads what parts of the frozen prefix return on the way to its last outputs"
_UNSTEADY = (
    "the frozen prefix gives other features for the same samples from pass to pass: it draws random numbers in "
    "evaluation mode too, or keeps a state between batches"
)
_MIXED = "features that the frozen prefix gives for a sample depend on the other samples of the batch"
_AMBIGUOUS = (
    "the model's inputs have two dimensions of the batch's size, and nothing shows which is that of the samples"
)
_NO_ROWS = "the frozen prefix gives no features with one row a sample"
_WRITTEN = "the model writes to the features that the frozen prefix gives"
_NO_CALL = "no module ends before the first layer that trains"


def best_cut(calls: Sequence[Call], keepable: Callable[[Call], bool], right: Callable[[Cut], bool]) -> Cut | None:
    """The cut that skips most and is given least, of those that a frozen prefix allows; None where none is right.

    calls: of one pass, from `trace_calls`. keepable: whether a call's output can be kept by sample. right: whether a
    pass with this cut gives what the pass without it gave.

    The prefix ends where the first module begins that holds a parameter that trains. A module that ends before that,
    whose parent does not, can be left out as a whole. At first all of their outputs are given. Then as many as can be,
    counted from the first, are answered with stand-ins, and then each of the others that can. Modules without
    parameters are treated like the rest in the first round and run in the second: something hidden in them may be
    needed. Where both rounds fail, one output alone is given and all behind it runs.
    """
    whole = [call for call in whole_calls(calls) if call.form is not None]
    weighty = [call for call in whole if any(True for _ in call.module.parameters())]
    if not weighty:
        return None
    for among in (whole, weighty):
        if any(map(keepable, among)) and right(_given_from(among, 0, keepable)):
            return _with_least(among, keepable, right)
    singles = (
        Cut((call,), tuple(earlier for earlier in among if earlier.end < call.end and not earlier.shares))
        for among in (whole, weighty)
        for call in reversed(whole)
        if keepable(call) and call.end >= weighty[0].end
    )
    return next(filter(right, singles), None)


def whole_calls(calls: Sequence[Call]) -> list[Call]:
    """The outermost calls that end before anything that trains begins."""
    boundary = min((call.start for call in calls if _trains(call.module)), default=0)
    return [
        call for call in calls if 0 < call.end < boundary and call.parent is not None and call.parent.end > boundary
    ]


def _with_least(among: Sequence[Call], keepable: Callable[[Call], bool], right: Callable[[Cut], bool]) -> Cut:
    """Skip what can be skipped of `among`, which is right with nothing skipped."""
    low, high = 0, max(index for index, call in enumerate(among) if keepable(call))
    while low < high:  # what may be skipped up to some index may be skipped up to any before it
        middle = (low + high + 1) // 2
        low, high = (middle, high) if right(_given_from(among, middle, keepable)) else (low, middle - 1)
    cut = _given_from(among, low, keepable)
    for call in among[low:]:
        given = tuple(other for other in cut.given if other is not call)
        less = Cut(given, cut.skipped if call.shares else (*cut.skipped, call))
        if given and right(less):
            cut = less
    return cut


def _given_from(among: Sequence[Call], index: int, keepable: Callable[[Call], bool]) -> Cut:
    """Everything before `index` is skipped, what can be given of the rest is, and what cannot runs."""
    return Cut(tuple(filter(keepable, among[index:])), tuple(call for call in among[:index] if not call.shares))


def _within(name: str, call: Call) -> bool:
    return name == call.name or name.startswith(f"{call.name}.")


def _read_by(replay: Replay, output: Any) -> set[int]:
    """The skipped calls on which something depends: what was read of them in the pass, and what it returns."""
    for each in stand_ins_in(tensors_anywhere_in(output)):
        replay.skipped.read.update(each.held.source.calls)
    return replay.skipped.read


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def same(first: Any, second: Any) -> bool:
    """Whether two results hold the same numbers; not, where they hold none that could be compared."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    compared = any(isinstance(a, Tensor) and a.is_floating_point() and a.numel() for a, _ in pairs)
    return compared and close(first, second, repeated)


def close(first: Any, second: Any, tolerance: Callable[[Tensor], float]) -> bool:
    """Whether two outputs have the same structure, and numbers that differ little.

    tolerance: by what share of the largest number, for a tensor of the second one.
    """
    one, other = tree_leaves(first), tree_leaves(second)
    if len(one) != len(other):
        return False
    found = []
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                return False
            at_once = a.device.type == "cpu" and a.layout == torch.strided and a.dtype in COMPARED
            if not (at_once and torch.equal(a, b)):
                found.append(_close(a, b, tolerance(b)))
    return not found or all(read(found))  # a GPU is waited for once


def _close(a: Tensor, b: Tensor, share: float) -> Tensor:
    if not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return (a == b).all()
    wide = a.dtype if a.is_complex() else torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    size = torch.where(a.isfinite(), a.abs(), 0.0)
    near = (a - b).abs() <= share * (size.max() + b.abs())
    return (near | (a == b) | (a.isnan() & b.isnan())).all()


def repeated(tensor: Tensor) -> float:
    """By how much two passes on the same batch may differ."""
    return max(_REPEATED, 2 * torch.finfo(tensor.dtype).eps if tensor.dtype in _HALF else _REPEATED)


def rounding(tensor: Tensor) -> float:
    """By how much a sample's numbers may differ between batches of different sizes, and between compiled and not."""
    half = tensor.dtype in _HALF or torch.is_autocast_enabled(tensor.device.type)
    return _ROUNDED_HALF if half else _ROUNDED.get(tensor.device.type, _ROUNDED_ELSEWHERE)


@contextmanager
def traceless(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Passes within it are without gradients, in evaluation mode, and leave no trace. seed: of their random numbers."""
    with isolated(model), without_own_hooks(model):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device
        yield


def gpus_of(model: nn.Module) -> list[int]:
    """The numbers of the CUDA devices that hold the model's parameters."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
