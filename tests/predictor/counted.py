"""A small chain that counts the calls of its layers, and running it beside a feature cache."""

from queue import SimpleQueue

import torch
from torch import nn

from predictor import FeatureCache, FreezeController, make_policy

X = torch.linspace(-1, 1, 12 * 64).reshape(12, 1, 8, 8).sin()
Y = torch.arange(12) % 3


class Notes:
    """A list that a pass beside the training does not bring back."""

    def __init__(self):
        self._items = SimpleQueue()
        self.append = self._items.put

    def __iter__(self):
        items = self.clear()
        for item in items:
            self.append(item)
        return iter(items)

    def clear(self):
        return [self._items.get() for _ in range(self._items.qsize())]


COMPUTED = Notes()
"""Each layer that has computed something, and on how many samples, in every pass."""


class _Counts:
    calls = 0

    def forward(self, x):
        self.calls += 1
        COMPUTED.append((self, len(x)))
        return super().forward(x)


class Counted(_Counts, nn.Linear):
    """A linear layer that counts its calls."""


class CountedConv(_Counts, nn.Conv2d):
    """A convolution that counts its calls."""


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), Counted(64, 8), nn.ReLU(), Counted(8, 8), nn.ReLU(), Counted(8, 8), Counted(8, 3)
    )


def cached(whole, layers=2, **options):
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    controller = FreezeController(whole, optimizer, make_policy("static", layers=layers), total_steps=9)
    return FeatureCache(controller, **options)


def run(model, cache, ids):
    with cache.batch(ids):
        return model(X[ids])


def alike(first, second):
    """Whether two results are the same but for rounding, which on some CPUs hangs on the size of the batch."""
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6)
