"""What is wrapped around a model while it trains, and what each wrapper needs when the frozen set changes.

- **`torch.compile`**: the model's compiled code is discarded at each change: see `compiled.CompiledCode`.
- **`DistributedDataParallel`**: the first process decides for all, and the gradient buckets are rebuilt over what still
  trains. So less is communicated, and no process waits for gradients that do not come.
- **FSDP2** (`fully_shard`): the first process decides for all. Nothing else is needed.
- **AMP**: nothing is needed, except for an optimizer whose parameters are all frozen: see `has_gradients`.
- **Activation checkpointing**: `use_reentrant=False`. The other kind is refused, at the start where it can be seen, and
  otherwise once gradients stay away: see `GradientWatch`.
- **CUDA graphs**: capture again in a callback of `on_change`. Modules that `torch.cuda.make_graphed_callables` has
  replaced are refused: they replay one backward pass for good.
- **FSDP1, DeepSpeed, LBFGS and DDP with `static_graph=True`** cannot follow, and are refused.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.errors import UsageError
from predictor.freezing.messages import on_forward
from predictor.layers.layer import Layer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 wants all of a unit's parameters to train or none, and returns no memory: use "
    "FSDP2, torch.distributed.fsdp.fully_shard(module)",
    "DeepSpeedEngine": "DeepSpeed fixes what trains when it starts: use DDP or FSDP2 (fully_shard)",
    "DeepSpeedZeroOptimizer": "DeepSpeed fixes what trains when it starts: use DDP or FSDP2 (fully_shard)",
    "DeepSpeedOptimizerWrapper": "DeepSpeed fixes what trains when it starts: use DDP or FSDP2 (fully_shard)",
    "LBFGS": "it moves all parameters along the steps before, those without a gradient too: use SGD or AdamW",
}
_REENTRANT = (
    "reentrant activation checkpointing gives no gradients to a layer that trains behind a frozen one: checkpoint with "
    "use_reentrant=False"
)
_PATIENCE = 3
"""Steps without gradients after which they count as lost."""


class Followed(Protocol):
    """What `follow` needs of a FreezeController."""

    agree: Callable[[frozenset[int], int], frozenset[int]]
    called_model: nn.Module
    """The model as the loop calls it."""

    @property
    def frozen(self) -> frozenset[int]:
        """Indices of the layers frozen now."""

    def on_change(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` after each change."""


def follow(controller: Followed, model: nn.Module) -> None:
    """Have what is wrapped around a model keep up with a controller's frozen set.

    A controller follows the model that it was given by itself. Call this for what is wrapped around it later, in every
    process:

        controller = FreezeController(net, optimizer, policy, total_steps=steps)
        model = DistributedDataParallel(net)
        follow(controller, model)

    Raises:
        UsageError: something around the model cannot keep up; the message names the cure.
    """
    refuse_unfit(model)
    controller.called_model = model
    for wrapper in _wrappers(model):
        if isinstance(wrapper, DistributedDataParallel):
            controller.agree = Agreement(wrapper.process_group)
            controller.on_change(partial(_rebuild_buckets, wrapper))
            if controller.frozen:
                _rebuild_buckets(wrapper)
    mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
    if mesh is not None:
        controller.agree = Agreement(ranks=mesh.mesh.flatten().tolist())


def refuse_unfit(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Raise UsageError where something in or around a model cannot follow a frozen set that changes."""
    for module in (*model.modules(), *optimizers):
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise UsageError(f"{kind.__name__} cannot freeze layers while it trains: {_REFUSED[kind.__name__]}")
        if isinstance(module, DistributedDataParallel):
            _refuse_unfit_ddp(module)
        if _is_reentrant(module):
            raise UsageError(f"{type(module).__name__}: {_REENTRANT}")
        if "make_graphed" in getattr(vars(module).get("forward"), "__qualname__", ""):  # Transformer Engine's too
            raise UsageError(
                f"{type(module).__name__} runs as a CUDA graph of make_graphed_callables, which computes all gradients "
                "for good: leave that out, or use torch.compile(mode='reduce-overhead'), which captures anew at each "
                "change"
            )


def refuse_capture() -> None:
    """Raise UsageError while a CUDA graph is captured: a controller's step there would run once, and never again."""
    cuda: Any = torch.cuda
    if cuda.is_initialized() and cuda.is_current_stream_capturing():
        raise UsageError(
            "controller.step() was called while a CUDA graph is captured: call it after each replay, outside the "
            "graph, and capture again in controller.on_change(callback)"
        )


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """A context in which DDP around a model does not get ready to exchange gradients."""
    with ExitStack() as stack:
        for wrapper in _wrappers(model):
            if isinstance(wrapper, DistributedDataParallel):
                stack.enter_context(wrapper.no_sync())
        yield


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any of an optimizer's parameters has a gradient.

    With a GradScaler and several optimizers, one of which may become wholly frozen, step only those with gradients:

        for optimizer in optimizers:
            if has_gradients(optimizer):
                scaler.step(optimizer)      # else: AssertionError, No inf checks were recorded for this optimizer
        scaler.update()
    """
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


class Agreement:
    """Makes the answer of a group's first process that of all. Each process calls it with its own answer.

    They talk over the CPU, so that no training waits for its GPU to see what was decided. Where the group cannot, one
    that can is made at the first call, for all agreements of the same processes.

    Args:
        group: the processes. By default all.
        ranks: the processes by their numbers, in place of a group.
    """

    def __init__(self, group: "ProcessGroup | None" = None, *, ranks: Sequence[int] | None = None) -> None:
        self._group: Any = group
        self._ranks = None if ranks is None else tuple(sorted(ranks))

    def __call__(self, wanted: frozenset[int], layers: int) -> frozenset[int]:
        """The set that the first process wants frozen.

        Args:
            wanted: what this process wants frozen, as layer indices.
            layers: how many layers there are.
        """
        ranks = self._ranks or tuple(dist.get_process_group_ranks(self._group or dist.group.WORLD))
        if len(ranks) == 1:
            return wanted
        chosen_L = torch.zeros(layers, dtype=torch.uint8, device="cpu")
        chosen_L[sorted(wanted)] = 1
        dist.broadcast(chosen_L, group=self._over_the_cpu(ranks), group_src=0)
        return frozenset(chosen_L.nonzero().flatten().tolist())

    def _over_the_cpu(self, ranks: tuple[int, ...]) -> Any:
        """A group of these processes whose messages go over the CPU."""
        everyone = len(ranks) == dist.get_world_size()
        if (everyone or self._ranks is None) and "cpu" in dist.get_backend_config(self._group):
            return self._group
        made = _groups.setdefault(dist.group.WORLD, {})
        if ranks not in made:
            made[ranks] = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        return made[ranks]


_groups: "WeakKeyDictionary[Any, dict[tuple[int, ...], Any]]" = WeakKeyDictionary()
"""Groups that agreements have made, by the group of all processes: another one after they have met anew."""


class GradientWatch:
    """Checks in the first steps after a change that gradients reach the layers that train.

    Reentrant checkpointing inside a `forward` cannot be seen from outside. Its effect can: the first layer behind the
    frozen ones has no gradient any more, while the head has. Without this check that layer would silently stand still.
    A layer may have none for other reasons: it is left out at random, its branch is not in use, it is detached. So from
    the first step without a gradient on it has to be seen to run inside an autograd function too.
    """

    def __init__(self, layers: Sequence[Layer], optimizers: Sequence[Optimizer]) -> None:
        self._layers = layers
        self._optimizers = optimizers
        self._had: frozenset[int] = frozenset()
        self._left = 0
        self._missed = 0
        self._inside = False  # whether the layer ran inside an autograd function
        self._handles: list[RemovableHandle] = []

    @property
    def watching(self) -> bool:
        """Whether the last change is so recent that the next step is still checked."""
        return self._left > 0

    def start(self, active: Sequence[int]) -> None:
        """Check the next steps. active: the layers that train from here on, by index, front to back."""
        self._had = frozenset(filter(self._has_gradient, active))
        self._left = _PATIENCE
        self._missed = 0
        self._inside = False
        self.close()

    def close(self) -> None:
        """Remove what looks at a layer that has missed its gradient."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self, active: Sequence[int]) -> None:
        """Call after each step, before gradients are cleared.

        Raises:
            UsageError: gradients have stayed away for some steps, and the layer runs inside an autograd function.
        """
        if not self._left or not active:
            return
        first = active[0]
        # Where there are no gradients at all, they were cleared, or this step was another network's, as a GAN's.
        if not any(has_gradients(optimizer) for optimizer in self._optimizers if self._holds(optimizer, first)):
            return
        self._left -= 1
        known = first in self._had or not any(map(self._has_gradient, active))
        self._missed += known and self._trains(first) and not self._has_gradient(first)
        if self._missed and not self._handles:
            self._handles = [on_forward(module, self._see_call) for module in self._layers[first].modules]
        if not self._left:
            self.close()
        if self._missed == _PATIENCE and self._inside:
            raise UsageError(
                f"no gradient has reached layer {first} ({self._layers[first].name}), which trains, in the {_PATIENCE} "
                f"steps since the layers frozen now were frozen: {_REENTRANT}"
            )

    def _see_call(self, *_: object) -> None:
        self._inside = self._inside or _is_inside_function()

    def _holds(self, optimizer: Optimizer, index: int) -> bool:
        own = set(map(id, self._layers[index].parameters()))
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    def _has_gradient(self, index: int) -> bool:
        return any(parameter.grad is not None for parameter in self._layers[index].parameters())

    def _trains(self, index: int) -> bool:
        return any(parameter.requires_grad for parameter in self._layers[index].parameters())


def _is_inside_function() -> bool:
    """Whether this is called from the forward pass of an autograd function, where no graph is recorded."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and isinstance(frame.f_locals.get(next(iter(code.co_varnames), "")), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what is wrapped in it, from the outside in."""
    while True:
        yield model
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = cast(nn.Module, model._orig_mod)
        else:
            return


def _refuse_unfit_ddp(ddp: DistributedDataParallel) -> None:
    if ddp.static_graph:
        raise UsageError("DDP with static_graph=True cannot freeze layers while it trains: leave static_graph out")
    options = ("mixed_precision", "_use_python_reducer", "_delay_all_reduce_params")
    if any(getattr(ddp, option, None) for option in options):
        raise UsageError(
            "DDP cannot freeze layers while it trains with mixed_precision (use torch.autocast), with "
            "delay_all_reduce_named_params, or with torch._dynamo.config.optimize_ddp='python_reducer'"
        )
    if not (_can_rebuild_buckets(ddp) or ddp.find_unused_parameters):
        raise UsageError(
            f"DDP of PyTorch {torch.__version__} is built otherwise than this library knows it, so it would wait for "
            "the gradients of frozen layers: give DistributedDataParallel find_unused_parameters=True"
        )


def _can_rebuild_buckets(ddp: DistributedDataParallel) -> bool:
    """Whether DDP has the private parts that `_rebuild_buckets` uses, as in PyTorch 2.6 to 2.14."""
    methods = {"_build_params_for_reducer": 0, "_build_debug_param_to_name_mapping": 1, "_ddp_init_helper": 4}
    return isinstance(getattr(ddp, "_comm_hooks", None), list) and all(
        callable(method := getattr(ddp, name, None)) and len(inspect.signature(method).parameters) == count
        for name, count in methods.items()
    )


def _rebuild_buckets(ddp: DistributedDataParallel, event: object = None) -> None:
    """Rebuild the gradient buckets, as a new DDP around the same model would.

    It happens in place, since others hold this one (Lightning and Accelerate in their own objects, a user in a
    variable), and without sending the whole model once more: it is the same in every process.
    """
    if not dist.is_initialized():  # the processes have parted, and a model is released
        return
    if not _can_rebuild_buckets(ddp):  # then DDP looks for unused parameters itself, or was refused
        return
    inner: Any = ddp
    hooks: list[tuple[Any, Any]] = inner._comm_hooks
    builtin = _builtin_hook(inner)
    parameters, sparse = inner._build_params_for_reducer()
    inner._ddp_init_helper(parameters, sparse, inner._build_debug_param_to_name_mapping(parameters), False)
    inner._has_rebuilt_buckets = False
    inner._comm_hooks = []
    # DDP takes one hook. It lists those too that it then refused.
    for hook, state in hooks[:1]:
        _forget_buckets(state)
        ddp.register_comm_hook(state, hook)
    if builtin is not None and not hooks:
        inner._register_builtin_comm_hook(builtin)


def _builtin_hook(ddp: Any) -> Any:
    """The hook that DDP runs in C++, which it lists nowhere but in its log; None where there is none."""
    try:
        name = str(ddp._get_ddp_logging_data().get("comm_hook", ""))
        kinds: Any = getattr(dist, "BuiltinCommHookType", None)
        return getattr(kinds, name.removeprefix("BuiltinCommHookType."), None)
    except (AttributeError, RuntimeError):  # another PyTorch, or a DDP that logs nothing
        return None


def _forget_buckets(state: Any) -> None:
    """Drop what PowerSGD keeps for each bucket, which fits no other buckets.

    It goes on as it started: DDP builds its buckets once more after the first step with them, and until then gradients
    are sent as they are.
    """
    if not hasattr(state, "start_powerSGD_iter"):
        return
    state.iter = min(state.iter, state.start_powerSGD_iter - 2)
    for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        kept.clear()


def _is_reentrant(module: object) -> bool:
    """Whether a module declares reentrant checkpointing, as Transformers' modules and torch's own wrapper do."""
    if getattr(getattr(module, "checkpoint_impl", None), "name", None) == "REENTRANT":
        return True
    function = getattr(module, "_gradient_checkpointing_func", None)
    on = getattr(module, "gradient_checkpointing", False)
    return bool(on and isinstance(function, partial) and function.keywords.get("use_reentrant"))
