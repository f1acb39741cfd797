"""Layers' outputs for a batch: taking a batch from the training, and forward passes beside it."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.jit import ScriptModule
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from predictor.errors import UsageError
from predictor.layers.isolated_pass import isolated
from predictor.layers.layer import Layer
from predictor.layers.tensors import copied, tensors_in
from predictor.policies.measuring.gradients import real_of
from predictor.policies.measuring.similarity import by_sample


@dataclass(frozen=True)
class Batch:
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: str
    """The lower precision of the call's autocast, such as "bfloat16"; empty where there was none."""

    @property
    def samples(self) -> int:
        """The first dimension of the first tensor; 0 where there is none."""
        return next((leaf.shape[0] for leaf in tensors_in((self.args, self.kwargs)) if leaf.dim()), 0)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; the CPU where there is none."""
        return next((leaf.device for leaf in tensors_in((self.args, self.kwargs))), torch.device("cpu"))

    def kept(self) -> "Batch":
        """A copy that no other code writes to."""
        return self._each(torch.clone)

    def moved(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def state_dict(self) -> dict[str, Any]:
        """The call, its tensors on the CPU."""
        there = self.moved(torch.device("cpu"))
        return {"args": list(there.args), "kwargs": there.kwargs, "autocast": self.autocast}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> "Batch":
        """The call of a `state_dict`, its tensors on a device."""
        return cls(tuple(state["args"]), dict(state["kwargs"]), state["autocast"]).moved(device)

    def _each(self, function: Any) -> "Batch":
        args, kwargs = tree_map(
            lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Batch(args, kwargs, self.autocast)


class BatchTaker:
    """Takes the next batch that a model trains on, after `wait` was called. Without it there is no hook on the model.

    `torch.compile` compiles a model twice, with and without the hook. Calls of a compiled `nn.Sequential` are not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle: RemovableHandle | None = None
        self._batch: Batch | None = None
        self._missed = 0  # steps in a row in which the model was not called

    @property
    def waiting(self) -> bool:
        """Whether `wait` was called since the last `taken`."""
        return self._handle is not None or self._batch is not None

    def wait(self) -> None:
        """Take the batch of the model's next call with gradients switched on."""
        if self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._take, with_kwargs=True)

    def taken(self) -> Batch | None:
        """The batch, which is dropped here; None if the model was not called, with a warning the second time."""
        batch = self._batch
        self.close()
        # A call in which the layers were shown had begun before it could be waited for.
        self._missed = 0 if batch is not None else self._missed + 1
        if self._missed > 1:
            warnings.warn(
                f"no call of {type(self._model).__name__} was seen in a training step, so its layers were not "
                "measured: call the model that the controller was given, and compile no nn.Sequential as a whole",
                stacklevel=3,
            )
        return batch

    def close(self) -> None:
        """Stop waiting, and drop the batch."""
        self._release()
        self._batch = None

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # PyTorch calls a hook so that another has removed during the same call
            return
        # Neither a validation pass, nor a copy of the model that DataParallel made on another device.
        if not torch.is_grad_enabled() or module is not self._model:
            return
        self._release()
        batch = Batch(args, kwargs, "")._each(Tensor.detach)
        kind = batch.device.type
        if torch.is_autocast_enabled(kind):
            batch = Batch(batch.args, batch.kwargs, str(torch.get_autocast_dtype(kind)).removeprefix("torch."))
        self._batch = batch


def outputs_of(
    model: nn.Module,
    layers: Mapping[int, Layer],
    batch: Batch,
    digest: Callable[[Tensor], Tensor] = torch.clone,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Each layer's output for a batch, through `digest`, by layer index.

    A layer's output is what `layer.output` returns at its first call. The model is left as it was (see `isolated`). It
    runs in evaluation mode, no further than to the last of the outputs. Layers whose output has no row for each sample
    are left out.

    Args:
        model: the model.
        layers: the layers by index.
        batch: the inputs.
        digest: takes features_BF in float32. It is called at once, since the model may overwrite its outputs.
        weights: parameters and buffers by name, which replace the model's own during this pass.
    """
    found: dict[int, Tensor | None] = {}
    # TorchScript modules take no hooks.
    seen = {index: layer.output for index, layer in layers.items() if not isinstance(layer.output, ScriptModule)}
    kind, dtype = batch.device.type, getattr(torch, batch.autocast) if batch.autocast else None

    def take(index: int, module: nn.Module, inputs: object, output: object) -> None:
        if index not in found:
            features_BF = by_sample(output, batch.samples)
            with torch.autocast(kind, enabled=False):
                found[index] = None if features_BF is None else digest(real_of(features_BF).flatten(1))
            if len(found) == len(seen):
                raise _AllSeen

    args, kwargs = copied((batch.args, batch.kwargs))
    with isolated(model), ExitStack() as stack:
        for index, module in seen.items():
            stack.callback(module.register_forward_hook(partial(take, index)).remove)
        # Without autocast's cache: the training must not find weights there that were cast without gradients.
        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False))
        stack.enter_context(suppress(_AllSeen))
        if weights is None:
            model(*args, **kwargs)
        else:
            functional_call(model, dict(weights), args, kwargs)
    return {index: digested for index, digested in found.items() if digested is not None}


def refuse_sharded(model: nn.Module, policy: str) -> None:
    """Raise UsageError for a sharded model: a pass of its own cannot end halfway there."""
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UsageError(
            f"policy {policy!r} runs the model beside the training, which a sharded model does not allow: use DDP, or "
            "a policy that looks at weights, such as smartfrz"
        )


class _AllSeen(Exception):
    """Ends a pass once all outputs have been seen."""
