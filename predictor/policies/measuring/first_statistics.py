"""Running statistics of BatchNorms that have seen no data yet, as the first batches make them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from predictor.layers.layer import Layer
from predictor.layers.parts import unwrapped
from predictor.policies.measuring.gradients import to_host


class FirstStatistics:
    """Measures what a BatchNorm that freezes before the first step would otherwise never know of its inputs.

    Its mean would stay 0 and its variance 1, so that it would normalise nothing.

    Args:
        model: the model, as it is called. In evaluation mode all of it, or in the modes of the training.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        norms = [module for module in inner.modules() if isinstance(module, _BatchNorm) and _counts(module)]
        norms = [norm for norm in norms if norm.training or not inner.training]  # others the user has switched off
        counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        seen = to_host(counts).tolist() if norms else []
        fresh = [norm for norm, batches in zip(norms, seen, strict=True) if not batches]
        # Where several processes train, theirs have to be the same: DDP sends those of the first with each batch.
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        alone = alone or torch.distributed.get_world_size() == 1
        same = alone or (isinstance(model, DistributedDataParallel) and model.broadcast_buffers)
        self._measured = [norm for norm in fresh if same and not isinstance(norm, nn.SyncBatchNorm)]
        self._unmeasured = set(fresh) - set(self._measured)
        self._batches = 0
        self._found: dict[nn.Module, dict[str, Tensor]] = {}
        self._before: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context, within an isolated pass, in which they normalise by the batch. Call `next_batch` before each."""
        before = [(norm, norm.training, norm.momentum) for norm in self._measured]
        try:
            for norm in self._measured:
                norm.training = True
            yield
            self._found = {n: {name: b.detach().clone() for name, b in n.named_buffers()} for n in self._measured}
        finally:
            for norm, mode, momentum in before:
                norm.training, norm.momentum = mode, momentum

    def next_batch(self) -> None:
        """Have all batches so far and the next one count alike."""
        self._batches += 1
        for norm in self._measured:
            norm.momentum = 1 / self._batches

    def lacking(self, layer: Layer) -> bool:
        """Whether a layer has one that cannot be measured: it has to see data in the training itself."""
        return any(inner in self._unmeasured for module in layer.modules for inner in module.modules())

    @torch.no_grad()
    def write(self, layers: Iterable[Layer]) -> None:
        """Give layers' BatchNorms what was measured."""
        for norm in {inner for layer in layers for module in layer.modules for inner in module.modules()}:
            for name, value in self._found.get(norm, {}).items():
                buffer = norm.get_buffer(name)
                self._before.append((buffer, buffer.detach().clone()))
                buffer.copy_(value)

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo `write`."""
        for buffer, value in self._before:
            buffer.copy_(value)
        self._before.clear()


def _counts(norm: _BatchNorm) -> bool:
    count = norm.num_batches_tracked
    return norm.track_running_stats and norm.running_mean is not None and count is not None and not count.is_meta
