"""The feature cache under `torch.compile`."""

import torch
from torch import nn
from torch.nn import functional as F

from predictor import FeatureCache, FreezeController, make_policy
from tests.predictor.counted import X, Y, alike


def test_a_compiled_model_skips_its_prefix_and_is_not_compiled_anew_for_each_batch():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(compiled, optimizer, make_policy("static", layers=2), total_steps=99)
    cache = FeatureCache(controller)
    made = []
    for _ in range(12):
        ids = torch.randperm(12)[:6] if cache.hits else torch.arange(12)
        with cache.batch(ids):
            out = compiled(X[ids])
        assert alike(out, model(X[ids]))
        F.cross_entropy(out, Y[ids]).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        made.append(len(graphs))
    assert (cache.hits, cache.misses) == (11, 1)
    assert made[4] == made[-1]
    torch.compiler.reset()
