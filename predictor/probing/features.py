"""The features that a model's head gets, and its labels: one pass over a loader that changes nothing."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from predictor.errors import UsageError
from predictor.layers.isolated_pass import isolated
from predictor.layers.loaders import beside_the_training
from predictor.layers.tensors import converted, tensors_anywhere_in

Unpack = Callable[[Any], tuple[Any, Tensor]]
"""From a batch to the model's inputs (a tensor, a tuple of inputs or a dict of named ones) and the labels."""
_LABELS = ("labels", "label", "label_ids")
_ROUNDING = torch.finfo(torch.bfloat16).eps
"""By this share of the largest output the same arithmetic may differ in another precision or order."""


class Unfit(Exception):
    """There is no probe, for the reason that it gives."""


class FeatureCollector:
    """Runs a model over a loader, and collects what its head gets.

    Args:
        model: the model, unwrapped.
        head: the linear layer's name, or that of a module with it; None to find it.
        unpack: makes inputs and labels of a batch; None for batches of a usual form.

    Raises:
        UsageError: `head` names no linear layer.
    """

    def __init__(self, model: nn.Module, head: str | None, unpack: Unpack | None) -> None:
        self._model, self._candidates, self._unpack = model, _candidates(model, head), unpack or _unpacked
        self.linear: Any = None
        self.samples = self.passed = 0

    @property
    def head(self) -> str:
        """The name of the head's linear layer; empty before it is found."""
        return self._candidates.get(self.linear, "")

    def collect(self, loader: Iterable[Any], most: int) -> tuple[Tensor, Tensor]:
        """Features x_NF in float32, and labels y_N on the CPU."""
        if any(hasattr(parameter, "device_mesh") for parameter in self._model.parameters()):
            raise Unfit("the model is sharded (FSDP2): call probe_head before fully_shard")
        features, labels = [], []
        # With gradients: a FeatureCache takes a pass without them for a test.
        loader = beside_the_training(loader)
        others = [loader, self._unpack]
        with isolated(self._model, gradients=True, others=others), _closed_after(iter(loader)) as iterator:
            for batch in iterator:
                inputs, y_B = self._unpack(batch)
                _check_labels(y_B)
                if self.linear is None:
                    self._find_head(inputs, len(y_B))
                features.append(self._features(inputs, len(y_B)))
                labels.append(y_B.detach().cpu().long())
                self.samples += len(y_B)
                if self.samples >= most:
                    break
        if not features:
            raise UsageError("loader gives no batch: give one that can be iterated over more than once")
        return torch.cat(features), torch.cat(labels)

    def _find_head(self, inputs: Any, samples: int) -> None:
        """Take the linear layer that is called last, and see that it is one that can be fitted."""
        called: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            called[:] = [(module, args, kwargs)]

        with _hooked(self._candidates, note):
            self._call(inputs, samples)
        if not called:
            raise Unfit("the model has no linear layer that trains, shares no weight, and is called in its pass")
        self.linear, args, kwargs = called[0]
        if not all(parameter.requires_grad for parameter in self.linear.parameters()):
            raise Unfit(f"the weight of the model's last linear layer, {self.head!r}, trains, and its bias does not")
        if len(args) != 1 or kwargs or not _is_linear(self.linear, args[0]):
            raise Unfit(
                f"the model's last linear layer, {self.head!r}, does not just multiply its one input by its weight and "
                "add its bias: it has a hook or a forward of its own"
            )

    def _features(self, inputs: Any, samples: int) -> Tensor:
        """What the head makes the logits of: one row a sample.

        The head's output is replaced by numbers that tell rows and classes apart, half of them negative. So the logits
        show which rows they are, and that nothing else is made of them.
        """
        taken: list[tuple[Tensor, Tensor]] = []

        def mark(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any], output: Tensor) -> Tensor:
            x_RF = args[0].detach().flatten(0, -2)
            row_R1 = torch.arange(len(x_RF), dtype=torch.float32, device=output.device)[:, None]
            class_C = torch.arange(output.shape[-1], dtype=torch.float32, device=output.device)
            marks_RC = (row_R1 + class_C) * (1 - 2 * (class_C % 2))
            taken.append((x_RF, marks_RC))
            return marks_RC.clone().view(output.shape)

        with _hooked([self.linear], mark):
            output = self._call(inputs, samples)
        for logits_BC in _tensors_in(output):
            if logits_BC.shape == (samples, self.linear.out_features) and len(taken) == 1:
                x_RF, marks_RC = taken[0]
                rows_B = logits_BC[:, 0].detach().long().clamp(0, len(x_RF) - 1)
                if bool((logits_BC == marks_RC.index_select(0, rows_B)).all()):
                    return x_RF.index_select(0, rows_B).float()
        raise Unfit(f"the model's output is not that of its last linear layer, {self.head!r}, one row a sample")

    def _call(self, inputs: Any, samples: int) -> Any:
        self.passed += samples
        device = next(self._model.parameters()).device
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        try:
            args, kwargs = converted((args, kwargs), lambda tensor: tensor.detach().to(device, copy=True))
            return self._model(*args, **kwargs)
        except Exception as error:
            raise UsageError(
                f"{type(self._model).__name__} cannot be called with the inputs of a batch ({type(error).__name__}: "
                f"{error}): where a batch is not (inputs, labels), give unpack=, a function from it to both"
            ) from error


def _candidates(model: nn.Module, head: str | None) -> dict[nn.Module, str]:
    """The linear layers that may be the head, with their names."""
    linear = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if head is not None:
        named = [module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, head)]
        inside = {part for module in named for part in module.modules()}
        linear = {module: name for module, name in linear.items() if module in inside}
        if not linear:
            raise UsageError(f"head={head!r} names no linear layer, nor a module with one: see model.named_modules()")
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        module: name
        for module, name in linear.items()
        # Others are not looked at: a hook on a frozen module would be one that a FeatureCache has to mind.
        if isinstance(module.weight, nn.Parameter)  # not what a hook makes of others, as in pruning
        and module.weight.requires_grad
        and module.weight.is_floating_point()
        and not is_parametrized(module)
        and all(holders[id(parameter)] == 1 for parameter in module.parameters())
    }


def _is_linear(layer: Any, x: Tensor) -> bool:
    """Whether a layer, with the hooks on it, makes x W^T + b of its input.

    It is called with other weights than its own, since those of a new head may be zeros, which show nothing.
    """
    trial = {name: torch.randn_like(each, requires_grad=True) for name, each in layer.named_parameters()}
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], *__: Any) -> None:
        seen.append(args[0])  # after hooks that make other inputs

    with _hooked([layer], note):
        output = functional_call(layer, trial, (_as_weight(x, layer),))
    expected = F.linear(_as_weight(seen[0], layer), trial["weight"], trial.get("bias"))
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    output, expected = output.detach().float(), expected.detach().float()
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.allclose(output / largest, expected / largest, rtol=0, atol=_ROUNDING, equal_nan=True)


def _as_weight(x: Tensor, layer: Any) -> Tensor:
    """An input in the weight's precision, in which a layer can be called outside of the model's autocast."""
    return x.detach().to(layer.weight.dtype)


def _unpacked(batch: Any) -> tuple[Any, Tensor]:
    """The inputs and labels of a batch of a usual form."""
    if isinstance(batch, Mapping):
        key = next((name for name in _LABELS if name in batch), None)
        if key is not None:
            return {name: value for name, value in batch.items() if name != key}, batch[key]
        found = f"a dict of {', '.join(map(str, batch))}"
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return tuple(batch[:-1]), batch[-1]
    else:
        found = type(batch).__name__
    raise UsageError(
        f"the loader gives {found}, which has no labels that can be told apart: give (inputs, labels), a dict with "
        "'labels', or unpack=, a function from a batch to inputs and labels"
    )


@contextmanager
def _closed_after(iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()  # now, not when it is collected: it may be inside `cache.batch`


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(output: Any) -> list[Tensor]:
    return tensors_anywhere_in(dict(output) if isinstance(output, Mapping) else output)


def _check_labels(y_B: Any) -> None:
    if not isinstance(y_B, Tensor):
        raise UsageError(f"labels are a {type(y_B).__name__}: give a tensor, by unpack= where the loader gives none")
    if y_B.dim() != 1 or y_B.is_floating_point() or y_B.dtype == torch.bool:
        kind = str(y_B.dtype).removeprefix("torch.")
        raise Unfit(f"labels are {kind} of shape {tuple(y_B.shape)}, not one class a sample")
