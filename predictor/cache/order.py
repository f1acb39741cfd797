"""The order of an epoch's samples that lets features be read from their files almost one after another."""

import torch
from torch import Tensor

from predictor.errors import UsageError


def chunked_order(size: int, chunk: int, *, seed: int = 0, epoch: int = 0) -> Tensor:
    """order_N of the ids 0 to size - 1 in one epoch: shuffled, but for samples that always come near each other.

    Paper: chunk-wise shuffling, as it is told of "Rethinking the Potential of Layer Freezing" (arXiv 2508.15033). Rule:
    chunks of samples come in a random order, and samples in a random order within their chunk. Our reading: which
    samples make up a chunk is drawn once for a seed, since neighbours in a data set are often of one class. A
    FeatureStore keeps rows in the order in which samples first came, so a chunk's rows lie together in its file, and an
    epoch reads it chunk by chunk. Cost: batches are less random than after a free shuffle, the more so the smaller the
    chunks; one chunk of all samples is a free shuffle.

    Torch's global random numbers are neither used nor moved. Raises UsageError when `chunk` is below 1.
    """
    if chunk < 1:
        raise UsageError(f"chunk={chunk}: give the samples that are to stay together, from 1")
    first = seed * 1_000_003
    drawn_N = torch.randperm(size, generator=torch.Generator().manual_seed(first))
    chunks = torch.split(drawn_N, chunk)
    generator = torch.Generator().manual_seed(first + 1 + epoch)
    shuffled = [chunks[place] for place in torch.randperm(len(chunks), generator=generator).tolist()]
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in shuffled])
