"""The network against a plain reference."""

import math

import pytest
import torch

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.model.network import FreezePredictor


def make(**config):
    torch.manual_seed(0)
    model = FreezePredictor(PredictorConfig(**{"window": 4, "weights": 8, "hidden": 8, "key": 4, **config})).eval()
    return model, torch.randn(64, 4 if model.config.inputs == "raw" else 3, model.config.width)


@pytest.mark.parametrize("inputs", ["gain", "motion", "raw"])
def test_one_window_gives_the_same_alone_and_among_others(inputs):
    model, tokens = make(inputs=inputs)
    together = model(tokens)
    alone = torch.cat([model(tokens[i : i + 1]) for i in range(64)])
    assert together.shape == (64,)
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_newest_token_is_the_query_and_the_older_ones_are_keys_and_values():
    model, tokens = make(inputs="raw")
    for i in range(3):
        key, query, value = model.networks(tokens[i])
        scores = torch.stack([query[3] @ key[t] for t in range(3)]) / math.sqrt(4)
        z = sum(weight * value[t] for t, weight in enumerate(scores.softmax(dim=0)))
        assert torch.allclose(model(tokens)[i], model.output(z)[0], atol=1e-5)


def test_tokens_are_scaled_and_a_constant_one_gives_finite_numbers():
    model, tokens = make()
    before = model(tokens)
    model.scaling.mean.fill_(2.0)
    model.scaling.deviation.fill_(3.0)
    assert torch.allclose(model(tokens * 3 + 2), before, atol=1e-5)
    model.scaling.deviation[1] = 0
    assert model(tokens).isfinite().all()


@pytest.mark.parametrize(("setting", "value"), [("window", 2), ("weights", 0), ("dropout", 1.0)])
def test_a_configuration_that_cannot_be_is_refused(setting, value):
    with pytest.raises(UsageError, match=str(value)):
        PredictorConfig(**{setting: value})
