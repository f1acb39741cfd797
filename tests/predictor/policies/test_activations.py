"""Batches taken from a training, and passes beside it that leave no trace."""

import copy

import pytest
import torch
from torch import nn

from predictor.layers.layer import layers_of
from predictor.policies.measuring.activations import Batch, BatchTaker, outputs_of
from predictor.policies.measuring.quantized import QuantizedReference
from tests.predictor.counted import Notes


def of_all(layers):
    return dict(enumerate(layers))


PASSES = Notes()


class Shortcut(nn.Module):
    """Writes over its layers' outputs, takes its input by name, and passes it around a layer by an empty module."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.around = nn.Identity()
        self.third = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, *, x):
        PASSES.append("begun")
        x = self.first(x).relu_()
        y = self.second(x)
        y += self.around(x)
        out = self.head(self.third(y).mul_(0))
        PASSES.append("ended")
        return out


def test_the_next_batch_with_gradients_is_taken_and_no_other():
    model = nn.Linear(2, 2)
    taker = BatchTaker(model)
    assert not taker.waiting
    taker.wait()
    with torch.no_grad():
        model(torch.zeros(3, 2))
    x = torch.ones(5, 2, requires_grad=True)
    model(x * 2)
    assert not model._forward_pre_hooks
    model(torch.zeros(7, 2))
    assert taker.waiting
    batch = taker.taken()
    assert batch.samples == 5
    assert batch.args[0].tolist() == [[2.0, 2.0]] * 5
    assert not batch.args[0].requires_grad
    assert (batch.autocast, taker.waiting) == ("", False)


def test_a_model_that_was_not_called_in_two_steps_causes_a_warning():
    taker = BatchTaker(nn.Linear(2, 2))
    taker.wait()
    assert taker.taken() is None  # a call that shows the layers has begun before it is waited for
    taker.wait()
    with pytest.warns(UserWarning, match="no call of Linear was seen"):
        assert taker.taken() is None
    assert not taker.waiting


def test_a_compiled_model_gives_its_batches_too(make_toy):
    model = make_toy()
    frames = []
    compiled = torch.compile(model, backend=lambda graph, inputs: frames.append(graph) or graph)
    taker = BatchTaker(model)
    for value in range(5):
        if value in (1, 3):
            taker.wait()
        compiled(torch.full((4, 1, 8, 8), float(value)))
        if value in (1, 3):
            assert taker.taken().args[0].unique().tolist() == [value]
    assert len(frames) == 2  # without the hook and with it, and no more


def test_autocast_of_the_call_holds_for_the_pass_beside_it_but_not_for_the_digest():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    taker, layers = BatchTaker(model), layers_of(model)
    taker.wait()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(torch.randn(3, 4)) is not None and model[0](taker._batch.args[0])
    batch = taker.taken()
    assert batch.autocast == "bfloat16"
    assert Batch.of_state(batch.state_dict(), torch.device("cpu")).autocast == "bfloat16"
    found = outputs_of(model, of_all(layers), batch, lambda features: [features.clone(), features @ features.T])
    assert torch.equal(found[0][0], expected.float())
    assert found[0][1].dtype == torch.float32


def test_outputs_are_those_before_others_write_over_them_and_beside_no_shortcut():
    torch.manual_seed(0)
    model = Shortcut()
    layers = layers_of(model, {"x": torch.ones(2, 4)})
    assert [layer.name for layer in layers] == ["first", "second", "third"]
    PASSES.clear()
    x = torch.randn(5, 4)
    found = outputs_of(model, of_all(layers), Batch((), {"x": x}, ""))
    assert list(PASSES) == ["begun"]  # the head did not run
    first = model.first(x)
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], model.second(first.relu()))
    assert found[2].abs().sum() > 0


def test_a_pass_with_the_references_weights_leaves_the_model_as_it_was(make_toy):
    model = make_toy()
    layers = layers_of(model)
    x = torch.randn(6, 1, 8, 8)
    model(x).sum().backward()
    reference = QuantizedReference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    kept, own = copy.deepcopy(model.state_dict()), list(model.parameters())
    gradients, random = [p.grad.clone() for p in own], torch.get_rng_state()
    model.body[1].eval()
    now = outputs_of(model, {1: layers[1]}, Batch((x,), {}, ""))
    then = outputs_of(model, {1: layers[1]}, Batch((x,), {}, ""), weights=reference.weights())
    assert (now[1] - then[1]).abs().max() > 0.01
    assert not now[1].requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.body] == [True, False, *[True] * 8]
    assert all(before is after for before, after in zip(own, model.parameters(), strict=True))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(before, p.grad) for before, p in zip(gradients, own, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_are_not_called_or_give_no_rows_are_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.lone, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.last(x) + self.lone(x.mean(0)))

    model = Odd()
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["unused", "lone", "last"]
    assert outputs_of(model, of_all(layers), Batch((torch.ones(3, 2),), {}, "")).keys() == {2}
