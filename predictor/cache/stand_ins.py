"""What a skipped call returns: tensors without memory, which are computed where something reads them after all."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from predictor.layers.tensors import WithoutMemory

_ALLOTTING = frozenset(f"new_{each}" for each in ("empty", "empty_strided", "full", "ones", "zeros"))
_ALLOTTING |= {"empty", "full", "ones", "zeros", "rand", "randint", "randn"}
"""Operators that take a tensor for its shape alone; with `_like` behind some of the names."""
_MOST_KEPT = 1 << 16
"""Numbers of tensors that are kept for an operator that is put off."""
_RESHAPING = {"squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}
"""Operators that change a tensor's shape and leave it its memory."""
_TAGS = ("data_dependent_output", "dynamic_output_shape", "nondeterministic_seeded")
"""Of operators that cannot be put off: what they do depends on numbers, or on the state of a random generator."""

Compute = Callable[[], "list[Any]"]
"""Gives what the skipped calls return, in their order."""


class Skipped:
    """The calls that one pass skips, and whether something has read what they return.

    What they return are stand-ins. An operator on stand-ins is put off, and gives stand-ins. Where numbers are needed,
    as for something that trains, for a branch of the model's code or for a loss, the skipped calls are computed, and
    the operators on them, in their order.

    Args:
        like: for each call tensors on the right devices, which take the place of what it returns without `compute`.
        compute: gives what the calls return.
    """

    def __init__(self, like: Sequence[Sequence[Tensor]], compute: Compute | None = None) -> None:
        self.read: set[int] = set()
        """The numbers of the calls on which something depends that was read."""
        self._numbers = like
        self._compute = compute
        self._clock = count()
        self._live: weakref.WeakSet[_Source] = weakref.WeakSet()
        kinds = sorted({"cpu", *(leaf.device.type for leaves in like for leaf in leaves)})
        self._autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    def stand_ins(self, call: int, forms: Sequence[Tensor], devices: Sequence[torch.device]) -> "list[StandIn]":
        """What stands for the tensors of a call, which have these forms, on the device "meta"."""

        def run() -> list[Tensor]:
            if len(self._numbers) <= call:
                raise RuntimeError(
                    "the model reads what its frozen prefix has left in it, while the feature cache computes that: "
                    "train without the cache"
                )
            return [_laid_out_as(form, leaf) for form, leaf in zip(forms, self._numbers[call], strict=True)]

        source = self.source(run, [call])
        return [
            StandIn(form, device, _Held(source, place))
            for place, (form, device) in enumerate(zip(forms, devices, strict=True))
        ]

    def settle_what_is_left(self) -> None:
        """Compute what stand-ins stand for that are still there, so that they do not hold the batch."""
        left = [call for source in self._live if not source.is_computed for call in source.calls]
        if left:
            self.settle(left, in_operator=False)
        self._compute, self._numbers = None, []

    def source(self, run: "Callable[[], list[Tensor]]", calls: Iterable[int]) -> "_Source":
        """What will compute tensors, from what these calls return."""
        source = _Source(self, run, frozenset(calls), next(self._clock))
        self._live.add(source)
        return source

    def settle(self, calls: Iterable[int], in_operator: bool = True) -> None:
        """Compute all that stand-ins of this pass stand for.

        calls: those of which something is read. in_operator: whether this is called within an operator on a stand-in.
        """
        self.read.update(calls)
        compute, self._compute = self._compute, None
        if compute is not None:
            self._numbers = []  # nothing that is computed now has them
            with ExitStack() as stack, torch.overrides.enable_reentrant_dispatch() if in_operator else nullcontext():
                for kind, dtype, enabled in self._autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
                found = compute()
            self._numbers = [[leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)] for output in found]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind, _, _ in self._autocast:  # an operator that was put off is one below autocast
                stack.enter_context(torch.autocast(kind, enabled=False))
            for source in sorted(self._live, key=lambda each: each.order):
                source.results()


class _Source:
    """Computes tensors once: those that a call returns, or an operator."""

    def __init__(self, skipped: Skipped, run: Callable[[], list[Tensor]], calls: frozenset[int], order: int) -> None:
        self.skipped = skipped
        self.calls = calls
        self.order = order
        self._run: Callable[[], list[Tensor]] | None = run
        self._results: list[Tensor] = []

    def results(self) -> list[Tensor]:
        """The tensors."""
        if self._run is not None:
            self._results, self._run = self._run(), None
        return self._results

    @property
    def is_computed(self) -> bool:
        """Whether it has been asked for them."""
        return self._run is None


class _Held(NamedTuple):
    """One of the tensors that a source computes."""

    source: _Source
    place: int

    @property
    def tensor(self) -> Tensor:
        """It, computed."""
        return self.source.results()[self.place]


class StandIn(WithoutMemory):
    """Stands for a tensor that is not computed unless something reads it.

    Args:
        form: a tensor like it, on the device "meta".
        device: where it lies.
        held: what will compute it.
    """

    form: Tensor
    held: _Held
    views: "list[weakref.ref[StandIn]]"
    """This one and all that share memory with it."""

    @staticmethod
    def __new__(cls, form: Tensor, device: torch.device, held: _Held) -> "StandIn":
        """See the class."""
        made: StandIn = Tensor._make_wrapper_subclass(
            cls,
            form.shape,
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            device=device,
        )
        made.form, made.held, made.views = form, held, []
        made.views.append(weakref.ref(made))
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Put an operator off, or compute what it needs and run it."""
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        present = [leaf for leaf in leaves if isinstance(leaf, StandIn)]
        name = func._schema.name.partition("::")[2] if hasattr(func, "_schema") else str(func)
        if name.removesuffix("_like") in _ALLOTTING:
            return func(*tree_map(_of_that_shape, args), **tree_map(_of_that_shape, kwargs))
        if not all(each.held.source.is_computed for each in present) and not _needs_numbers(func, name, args, leaves):
            try:
                return _put_off(func, args, kwargs, present)
            except Exception:  # there is no such operator on tensors without memory, or it is a mistake of the caller's
                pass
        if torch.Tag.inplace_view in getattr(func, "tags", ()) and name not in _RESHAPING:
            raise RuntimeError(
                f"{name} changes the shape of what a part of the frozen prefix returned, which the feature cache had "
                "skipped: train without the cache, or use the form of it that makes a new tensor"
            )
        for each in present:
            each.held.source.skipped.settle(each.held.source.calls)
        made = func(*tree_map(_number, args), **tree_map(_number, kwargs))
        if isinstance(args[0], StandIn) and name in _RESHAPING:
            args[0].take_shape(func, args, kwargs)
        return args[0] if _writes_to_first(func) else made

    def number(self) -> Tensor:
        """What it stands for. The calls that it depends on are computed."""
        self.held.source.skipped.settle(self.held.source.calls, in_operator=False)
        return self.held.tensor

    @property
    def data(self) -> Tensor:
        """As of any tensor: the same without gradients."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, StandIn) or value.shape != self.shape or value.dtype != self.dtype:
            raise RuntimeError(
                "something else is put in the place of what a part of the frozen prefix returned, which the feature "
                "cache had skipped: train without the cache"
            )
        self.held = value.held

    def take_shape(self, func: Any, args: Any, kwargs: Any) -> None:
        """Take the shape that an operator gives to what it writes to."""
        with no_dispatch():
            func(*args, **kwargs)
        self.form = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    def tolist(self) -> Any:
        """As of any tensor."""
        return self.number().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As of any tensor."""
        return self.number().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any tensor."""
        return self.number().numpy().__array__(*args, **kwargs)

    def __format__(self, spec: str) -> str:
        """As of any tensor."""
        return str(self.number().__format__(spec))  # type: ignore[no-untyped-call]

    def __dlpack__(self, **options: Any) -> Any:
        """As of any tensor."""
        return self.number().__dlpack__(**options)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A copy of what it stands for."""
        return self.number().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What it stands for is written to files."""
        return self.number().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Does not read it."""
        return f"StandIn(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def stand_ins_in(tensors: Iterable[Tensor]) -> list[StandIn]:
    """Those of some tensors that stand for others."""
    return [tensor for tensor in tensors if isinstance(tensor, StandIn)]


def _number(value: Any) -> Any:
    return value.held.tensor if isinstance(value, StandIn) else value


def _of_that_shape(value: Any) -> Any:
    if not isinstance(value, StandIn):
        return value
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _needs_numbers(func: Any, name: str, args: Any, leaves: list[Any]) -> bool:
    """Whether an operator cannot be put off."""
    if not hasattr(func, "_schema") or any(getattr(torch.Tag, tag) in func.tags for tag in _TAGS):
        return True
    plain = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, StandIn)]
    if any(leaf.requires_grad for leaf in plain):
        return True
    if sum(leaf.numel() for leaf in plain if not isinstance(leaf, torch.nn.Parameter)) > _MOST_KEPT:
        return True
    if len({id(leaf.held.source.skipped) for leaf in leaves if isinstance(leaf, StandIn)}) > 1:
        return True  # of several passes, which would keep each other's batches
    if "batch_norm" in name and not (len(args) > 5 and args[5] is False):  # it writes to statistics, undeclared
        return True
    if not func._schema.is_mutable:
        return False
    alone = isinstance(args[0], StandIn) and sum(each() is not None for each in args[0].views) == 1
    return not (_writes_to_first(func) and alone)


def _writes_to_first(func: Any) -> bool:
    """Whether an operator writes to its first argument alone, and returns that."""
    schema = getattr(func, "_schema", None)
    if schema is None or len(schema.returns) != 1 or not schema.arguments:
        return False
    written = [
        argument for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return len(written) == 1 and written[0] is not None and written[0].name == schema.arguments[0].name


def _put_off(func: Any, args: Any, kwargs: Any, present: list[StandIn]) -> Any:
    """Note an operator on stand-ins, and give stand-ins for what it returns."""
    writes = _writes_to_first(func)
    forms = func(*tree_map(_form, args), **tree_map(_form, _on_meta(kwargs)))
    leaves, spec = tree_flatten(forms)
    if any(leaf.is_conj() or leaf.is_neg() for leaf in leaves if isinstance(leaf, Tensor)):
        raise NotImplementedError("a stand-in does not show that it is read otherwise than it lies in memory")
    held = tree_map(_kept, (args, kwargs))

    def run() -> list[Tensor]:
        own_args, own_kwargs = tree_map(
            lambda value: value.tensor if isinstance(value, _Held) else value,
            held,
            is_leaf=lambda value: isinstance(value, _Held),
        )
        if writes:
            own_args = (own_args[0].clone(), *own_args[1:])
        return tree_leaves(func(*own_args, **own_kwargs))

    source = present[0].held.source.skipped.source(run, {call for each in present for call in each.held.source.calls})
    if writes:
        args[0].held = _Held(source, 0)
        if torch.Tag.inplace_view in func.tags:
            args[0].take_shape(func, args, kwargs)
        return args[0]
    device = kwargs.get("device") or present[0].device
    shares = any(returned.alias_info is not None for returned in func._schema.returns)
    made = [
        StandIn(leaf, torch.device(device), _Held(source, index)) if isinstance(leaf, Tensor) else leaf
        for index, leaf in enumerate(leaves)
    ]
    if shares:
        for each in stand_ins_in(made):
            each.views = present[0].views
            each.views.append(weakref.ref(each))
    return torch.utils._pytree.tree_unflatten(made, spec)


def _laid_out_as(form: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor with the strides of its form."""
    if tensor.stride() == form.stride():
        return tensor
    return torch.empty_strided(form.shape, form.stride(), dtype=form.dtype, device=tensor.device).copy_(tensor)


def _kept(value: Any) -> Any:
    """An argument for later: a tensor may be written to till then. Only a large weight is not copied."""
    if isinstance(value, StandIn):
        return value.held
    return value.detach().clone() if isinstance(value, Tensor) and value.numel() <= _MOST_KEPT else value


def _form(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value.form
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else kwargs
