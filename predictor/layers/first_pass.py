"""The layers of a model as the training's own first pass shows them, in place of the order of definition."""

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.errors import UsageError
from predictor.layers.execution_order import ExecutionOrder, at_rest, definition_order, order_of_call
from predictor.layers.grouping import networks_in
from predictor.layers.isolated_pass import hidden
from predictor.layers.layer import Layer, layers_in_order, with_networks_ends
from predictor.layers.parts import holds_weight, parts_of, unwrapped
from predictor.layers.pass_hook import FormerHook, PassHook
from predictor.layers.tensors import tensors_in

Take = Callable[[tuple[Layer, ...]], None]


class FirstPass:
    """Watches a model until its first optimizer step, and hands over the layers that it is seen to have.

    The call of the whole model shows all at once. Where a loop calls modules inside it instead (Lightning's
    `training_step`, a generator and its discriminator, an encoder and a decoder), each shows its own order, and all are
    put together at the first step, in the order in which they were called. The ends of a module whose outputs all went
    into other modules are then no heads.

    A module is run on copies of a few samples (see `order_of_call`) right before the training runs it. A call with
    tensors in place of the model's parameters (`torch.func.functional_call`) shows nothing. Make it before
    anything is frozen that the user does not hold still, and call `watch` after all others have registered their hooks:
    the hook that was registered last runs first.

    Args:
        model: the model, as the loop calls it.
        optimizers: those of the training.
        take: gets the layers: before the first pass, and again at the first step where more has been seen by then.
            A bound method that is held weakly: when its owner is gone, so are the hooks.
        hidden: names of arguments that hooks remove before the model's `forward`.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], take: Take, hidden: Collection[str]) -> None:
        self._called_model, self._model = model, unwrapped(model)
        self._optimizers, self._hidden = optimizers, hidden
        self._take: weakref.WeakMethod[Take] = weakref.WeakMethod(take)
        self._orders: dict[nn.Module, ExecutionOrder] = {}  # of each module that the loop calls
        self._with_gradients: set[nn.Module] = set()  # those that it has called with gradients
        self._running: nn.Module | None = None
        self._given: list[tuple[nn.Module, Any]] = []  # what modules returned, as nodes of the graph of gradients
        self._used: dict[int, Any] = {}  # the nodes behind what modules were called with, held for their ids
        self._handles: list[RemovableHandle] = []
        self._compiled: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self._own = {id(parameter) for parameter in model.parameters()}
        self._ours = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    @property
    def watching(self) -> bool:
        """Whether it may still show other layers."""
        return bool(self._handles)

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        for module, compiled in self._compiled:
            module._compiled_call_impl = compiled
        self._handles, self._compiled, self._given, self._used = [], [], [], {}

    def settle(self) -> None:
        """Hand over the layers as far as calls of modules have shown them, and watch on."""
        if self._handles and self._orders:
            self._hand_over(self._together())

    def finish(self) -> None:
        """Call at the first step. Hands over the layers where modules were called on their own; warns where none was.

        Warns only where the model is made of several networks, so that it is uncertain which holds the head.
        """
        if not self._handles:
            return
        if self._orders:
            self._hand_over(self._together())
        else:
            self._warn_of_no_call()
        self.close()

    def watch(self) -> None:
        """Begin to watch."""
        modules = [
            self._called_model,
            *(module for module in self._model.modules() if module is not self._called_model),
        ]
        compiled = [module for module in modules if getattr(module, "_compiled_call_impl", None) is not None]
        if compiled or type(self._called_model).__name__ == "OptimizedModule":
            modules = modules[:1]  # hooks inside would be compiled
        for module in compiled[:1] if self._called_model in compiled else ():
            # Its hooks are compiled with it, and see nothing.
            self._compiled.append((module, module._compiled_call_impl))
            module._compiled_call_impl = partial(self._before_compiled, module, module._compiled_call_impl)
        for module in modules:
            before = PassHook(self._before)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        whole = module is self._called_model or module is self._model
        if self._running is not None and (whole or module is self._running) and not hidden():
            self._leave()  # a call that was interrupted, after which no hook runs
        if kwargs is None or self._running is not None or not self._handles or hidden():
            return
        if whole and self._called_model is not self._model and "forward" in vars(self._model):
            return  # Lightning redirects this call into another method, which will call modules
        if self._take() is None:
            self.close()
            return
        if not self._holds_its_own():
            return
        self._running = module
        # Only now: a cache takes forward hooks in what it skips for those of a user who wants to see each pass.
        self._handles.append(module.register_forward_hook(PassHook(self._after), always_call=True))
        try:
            if whole:
                self._see_the_whole(args, kwargs)
            else:
                self._see_a_part(module, args, kwargs)
        except BaseException:  # such as KeyboardInterrupt
            self._leave()
            raise

    def _holds_its_own(self) -> bool:
        """Whether the model's parameters are its own in this call, and not lent to it by `torch.func.functional_call`.

        One that has replaced another since then, as in a new head, is in an optimizer.
        """
        now = {id(parameter) for parameter in self._model.parameters()}
        groups = [group["params"] for optimizer in self._optimizers for group in optimizer.param_groups]
        return now <= self._own or now <= self._own.union(id(parameter) for group in groups for parameter in group)

    def _before_compiled(self, module: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for what `module.compile()` made, for one call."""
        if not self._handles:  # closed within an isolated pass, which has put this one back
            module._compiled_call_impl = call
        self._before(module, args, kwargs)
        return call(*args, **kwargs)

    def _see_the_whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        order = self._order_of(self._model, args, kwargs)
        self.close()
        if order is not None:
            self._hand_over(order)

    def _see_a_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._with_gradients.add(module)
        if any(module in set(called.modules()) for called in self._orders if called is not module):
            return  # whose order has been seen
        if module not in self._orders:
            parts = [part for part in parts_of(self._model) if part in set(module.modules())]
            order = self._order_of(module, args, kwargs) or definition_order(module, parts)
            self._orders[module] = order
            if len(self._orders) == 1 and self._model is self._called_model:
                # What has not been called yet: the last part of each network may be a head.
                self._hand_over(self._taking_part(module, order).then(self._unseen(module)), final=False)
        self._follow([tensor.grad_fn for tensor in tensors_in((args, kwargs)) if tensor.grad_fn is not None])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if module is self._running and not hidden():
            if self._handles:
                self._given += [(module, t.grad_fn) for t in tensors_in(output) if t.grad_fn is not None]
            self._leave()

    def _leave(self) -> None:
        """End the call that was seen last, whose hook was registered last."""
        self._running = None
        if self._handles:
            self._handles.pop().remove()

    def _follow(self, nodes: list[Any]) -> None:
        """Note all nodes that lead to these."""
        while nodes:
            node = nodes.pop()
            if id(node) not in self._used:
                self._used[id(node)] = node
                nodes += [before for before, _ in node.next_functions if before is not None]

    def _order_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExecutionOrder | None:
        kwargs = {name: value for name, value in kwargs.items() if name not in self._hidden}
        try:
            return order_of_call(self._model, parts_of(self._model), module, args, kwargs, self._ours)
        except Exception as error:
            warnings.warn(
                f"{type(module).__name__} could not be run to see in which order its layers run ({type(error).__name__}"
                f": {error}); they are in the order of definition. Pass layers=layers_of(model, example), or name the "
                "head with layers_of(model, head=...)",
                stacklevel=6,
            )
            return None

    def _taking_part(self, module: nn.Module, order: ExecutionOrder) -> ExecutionOrder:
        """The order of a module, empty for one that the user holds still and the loop calls without gradients alone.

        Such as a teacher. What is pretrained and at rest is called without gradients too, while it is evaluated.
        """
        bystander = module not in self._with_gradients and at_rest(module, self._ours)
        return order.without(set(module.modules())) if bystander else order

    def _unseen(self, called: nn.Module) -> ExecutionOrder:
        """The order of definition of what trains and is not inside a module, with an end for each network of it."""
        inside = set(called.modules())
        parts = [p for p in parts_of(self._model) if p not in inside and not at_rest(p, self._ours)]
        order = definition_order(self._model, parts)
        weights = filter(None, ([p for p in parts if p in own and holds_weight(p)] for own in self._beside(called)))
        return ExecutionOrder(order.first, order.last, order.parameters, frozenset(own[-1] for own in weights))

    def _beside(self, called: nn.Module) -> list[set[nn.Module]]:
        """The modules inside each of the largest modules that neither hold a module nor are inside it."""
        found, stack = [], [self._model]
        while stack:
            for child in stack.pop().children():
                inside = set(child.modules())
                if child is not called and called in inside:
                    stack.append(child)
                elif child is not called:
                    found.append(inside)
        return found

    def _together(self) -> ExecutionOrder:
        """The orders of all modules that were called, one after the other."""
        order = ExecutionOrder({}, {}, {})
        unused = {module for module, node in self._given if id(node) not in self._used}
        with_outputs = {module for module, _ in self._given}
        for module, own in self._orders.items():
            own = self._taking_part(module, own)
            fed = module in with_outputs - unused
            order = order.then(ExecutionOrder(own.first, own.last, own.parameters, frozenset() if fed else own.ends))
        return order

    def _hand_over(self, order: ExecutionOrder, final: bool = True) -> None:
        take = self._take()
        if take is None:
            return
        try:
            order = with_networks_ends(self._model, order, self._optimizers)
            layers = layers_in_order(self._model, order, ours=self._ours)
        except UsageError as fault:
            if final:
                warnings.warn(f"{fault}. The layers stay those in the order of definition", stacklevel=6)
            return
        take(layers)

    def _warn_of_no_call(self) -> None:
        networks = [net for net in networks_in(self._model) if any(p.requires_grad for p in net.parameters())]
        if len(networks) > 1:
            last = [name for part, name in parts_of(self._model).items() if holds_weight(part)][-1]
            warnings.warn(
                f"{type(self._model).__name__} was not seen to run before the first step, so {last!r}, which is "
                "defined last, is taken for its head: pass layers=layers_of(model, example), or name the head with "
                "layers_of(model, head=...)",
                stacklevel=5,
            )


_Hook = FormerHook
"""In models that an earlier version has saved."""
