"""What the gradients of a few batches say of each layer before the first step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from predictor.errors import UsageError
from predictor.layers.batch import part_of
from predictor.layers.isolated_pass import isolated
from predictor.layers.layer import Layer
from predictor.layers.loaders import beside_the_training
from predictor.layers.parts import unwrapped
from predictor.layers.tensors import tensors_in
from predictor.model.first_look import FirstLook
from predictor.policies.measuring.first_statistics import FirstStatistics
from predictor.policies.measuring.gradients import real_of, to_host
from predictor.policies.measuring.learned import evidence_of
from predictor.policies.measuring.unready import CLOSED, Openness

BATCHES = 8
"""Batches of which a part is looked at. Half of them are the other half's noise."""
_SCALE = 1024.0
"""So much larger are gradients in the backward pass of a loss that is computed in float16, where small ones would
vanish. Others are as in training: what clips gradients in a hook would clip larger ones to less of them."""


class _NoLook(Exception):
    """There is no look, for the reason that the message gives."""


def look_at(
    model: nn.Module,
    layers: Sequence[Layer] | Callable[[], Sequence[Layer]],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    others: Sequence[object] = (),
    around: Callable[[float], AbstractContextManager[object]] = nullcontext,
    why_not: Callable[[str], None] | None = None,
    statistics: FirstStatistics | None = None,
) -> FirstLook | None:
    """Look at the gradients of a model's first batches. The model, its gradients and the random state stay as they are.

    Of each of 8 batches it takes a quarter of the samples (`part_of`), which tells as much. Where `loss` raises an
    error on such a part, it takes whole batches. Two copies of all weights that train are kept for that time.
    BatchNorms that have seen no data yet normalise by the batch; all else is in evaluation mode.

    Args:
        model: the model, as it is called.
        layers: those that are looked at, or what returns them once the first loss is there.
        batches: opened in here. The loader's samplers and data set are left as they were, too.
        loss: from a batch to its loss. What it uses is left as it was.
        others: further objects that are left as they were.
        around: makes a context for computing a loss, given which part of the batch it is of.
        why_not: takes the reason where there is no look.
        statistics: made for this model; it keeps what BatchNorms see that have seen no data yet.

    Returns:
        None where there are fewer than two batches, where a gradient is missing or not a finite number, and where the
        weights are sharded or have no memory.

    Raises:
        UsageError: a loss is not one number with a graph.
    """
    try:
        _refuse_unfit(model)
        batches = beside_the_training(batches)
        statistics = FirstStatistics(model) if statistics is None else statistics
        with (
            isolated(model, gradients=True, others=[batches, loss, *others]),
            _without_cudnn_for_rnns(model),
            statistics.measuring(),
        ):
            return _sums_of(layers, batches, loss, around, statistics).look(Openness(unwrapped(model)), statistics)
    except (_NoLook, torch.OutOfMemoryError) as error:
        if why_not is not None:
            why_not(str(error) if isinstance(error, _NoLook) else "there is not enough memory on the device")
        return None


def _sums_of(
    layers: Sequence[Layer] | Callable[[], Sequence[Layer]],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    around: Callable[[float], AbstractContextManager[object]],
    statistics: FirstStatistics,
) -> "_Sums":
    sums: _Sums | None = None
    cuts: bool | None = None  # as long as no batch could be cut
    for batch in islice(batches, BATCHES):
        statistics.next_batch()
        cuts = _can_be_cut(batch, loss) if cuts is None else cuts
        part, share = (batch, 1.0) if cuts is False else part_of(batch)
        with around(share), _Float16() as float16:
            found = loss(part)
        _check(found)
        sums = sums or _Sums(layers() if callable(layers) else layers)
        sums.add(found, scale=_SCALE if float16.seen else 1.0)
        del found  # and its graph, before the next one is made
    if sums is None or sums.count < 2:
        raise _NoLook("there are fewer than two batches")
    return sums


def _can_be_cut(batch: Any, loss: Callable[[Any], Tensor]) -> bool | None:
    """Whether a part of a batch has a loss; None where there are too few samples. The model shows itself later."""
    try:
        part, share = part_of(batch)
        if share == 1.0:
            return None
        loss(part)
    except Exception:  # of a model that is made for one size of batches, or of samples that cannot be cut so
        return False
    return True


class _Float16(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether anything is computed in float16: of such weights, or under autocast, which a model may switch on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        output = func(*args, **(kwargs or {}))
        self.seen = self.seen or any(tensor.dtype == torch.float16 for tensor in tensors_in(output))
        return output


class _Sums:
    """Sums of the gradients of several batches, as they are and with every other one's sign turned."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.count = 0
        self._layers = layers
        self._trained = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        if not any(self._trained):
            raise _NoLook("no layer trains")
        self._sums, self._turned = ([[_zeros(p) for p in own] for own in self._trained] for _ in range(2))

    def add(self, loss: Tensor, scale: float) -> None:
        """Add the gradients of a loss, which is so much larger in the backward pass."""
        flat = [p for own in self._trained for p in own]
        try:
            found = torch.autograd.grad(loss, flat, torch.full_like(loss, scale), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # as under reentrant checkpointing
            raise _NoLook(f"the backward pass fails ({type(error).__name__}: {error})".splitlines()[0]) from error
        if all(gradient is None for gradient in found):
            raise _NoLook("the loss depends on no layer that trains")
        for sums, sign in ((self._sums, 1), (self._turned, -1 if self.count % 2 else 1)):
            for total, gradient in zip((each for own in sums for each in own), found, strict=True):
                if gradient is not None:
                    total.add_(gradient.to_dense() if gradient.is_sparse else gradient, alpha=sign / scale)
        self.count += 1

    @torch.no_grad()
    def look(self, openness: Openness, statistics: FirstStatistics) -> FirstLook:
        """The norms, read with one synchronization for each device."""
        scaled = 1 / self.count
        rows = [
            torch.stack(
                [
                    *(norm(values, layer.own[0].device) * scaled for values in (mean, noise) for norm in (_l1, _l2)),
                    *(norm(list(layer.parameters()), layer.own[0].device) for norm in (_l1, _l2)),
                    evidence_of(layer),
                    openness.of(layer),
                ]
            )
            for layer, mean, noise in zip(self._layers, self._sums, self._turned, strict=True)
        ]
        table = to_host(rows).double()
        if not bool(table.isfinite().all()):
            raise _NoLook("a gradient or a weight is not a finite number; give look() losses that are not scaled")
        mean_l1, mean_l2, noise_l1, noise_l2, weight_l1, weight_l2, evidence, opened = map(tuple, table.T.tolist())
        sizes = tuple(layer.size for layer in self._layers)
        unready = tuple(o < CLOSED or statistics.lacking(each) for o, each in zip(opened, self._layers, strict=True))
        norms = mean_l1, noise_l1, mean_l2, noise_l2, weight_l1, weight_l2
        return FirstLook(self.count, *norms, sizes, evidence, unready)


def _zeros(parameter: Tensor) -> Tensor:
    narrow = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.zeros_like(parameter, dtype=torch.float32 if narrow else None, requires_grad=False)


def _refuse_unfit(model: nn.Module) -> None:
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise _NoLook("the model is sharded")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _NoLook("the weights are on the meta device")


def _check(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise UsageError(f"look() was given {given} for a batch: give its loss, a tensor with one number")
    if not loss.requires_grad:
        raise UsageError("a loss given to look() has no graph: compute it with gradients, without .detach() or no_grad")


@contextmanager
def _without_cudnn_for_rnns(model: nn.Module) -> Iterator[None]:
    """Without cuDNN, where a model has recurrent layers: they refuse a backward pass in evaluation mode."""
    enabled = torch.backends.cudnn.enabled
    try:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _l1(values: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=device)
    for value in values:
        total += real_of(value).abs().sum().to(device)
    return total


def _l2(values: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=device)
    for value in values:
        total += real_of(value).square().sum().to(device)
    return total.sqrt()
