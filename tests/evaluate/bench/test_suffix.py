"""The limit: layers trained on ready outputs of a prefix that is never called, and the prefix alone."""

import itertools

import pytest
import torch
from torch import nn

from collect.workloads import Recipe, Workload
from data.sources import load_source
from evaluate.bench.suffix import Subject, frozen_training, prefix_pass, suffix_training
from predictor.errors import UsageError
from tests.evaluate import toys

CPU = torch.device("cpu")


@pytest.fixture
def source():
    return load_source("digits", train_samples=100)


class Counted(nn.Linear):
    """A linear layer that counts the calls of all of its kind."""

    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


class Around(nn.Module):
    """Two layers with a connection around them, whose sum is written into the second one's output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = x.flatten(1)
        out = self.second(torch.relu(self.first(x)))
        out += x
        return self.third(out)


def workload_of(*modules, optimizer="sgd"):
    recipe = Recipe(epochs=1, batch_size=10, optimizer=optimizer, momentum=0.9)
    return Workload("toy", "toy", lambda _: nn.Sequential(*[make() for make in modules]), "digits", recipe)


def three_and_head():
    return workload_of(nn.Flatten, *[lambda: Counted(64, 64)] * 3, lambda: nn.Linear(64, 10))


def around():
    return workload_of(Around, lambda: nn.Linear(64, 10))


def gradients_of_each(training, batches):
    endless = itertools.cycle(batches)
    for _ in range(2 * len(batches)):
        training.take_step(endless)
        yield [parameter.grad.clone() for parameter in training.model.parameters() if parameter.grad is not None]
        training.optimizer.zero_grad()


@pytest.mark.parametrize(("workload", "count"), [(three_and_head(), 2), (around(), 1), (around(), 3)])
def test_the_suffix_learns_what_it_learns_behind_a_frozen_prefix(source, workload, count):
    batches = Subject(workload, source, CPU).batches(epoch=0)
    alone = gradients_of_each(suffix_training(Subject(workload, source, CPU), count, batches), batches)
    behind = gradients_of_each(frozen_training(Subject(workload, source, CPU), count), batches)
    for one, other in zip(alone, behind, strict=True):
        assert len(one) == len(other) > 0
        assert all(map(torch.equal, one, other))


def test_the_front_is_never_called(source):
    workload = three_and_head()
    batches = Subject(workload, source, CPU).batches(epoch=0)
    training = suffix_training(Subject(workload, source, CPU), 2, batches)
    Counted.calls = 0
    list(gradients_of_each(training, batches))
    assert Counted.calls == 2 * len(batches)  # the third layer, once a step
    held = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    assert [tuple(parameter.shape) for parameter in held] == [(64, 64), (64,), (10, 64), (10,)]


def test_the_front_alone_ends_with_its_last_layer(source):
    workload = three_and_head()
    run = prefix_pass(Subject(workload, source, CPU), 2, Subject(workload, source, CPU).batches(epoch=0))
    Counted.calls = 0
    for _ in range(5):
        run()
    assert Counted.calls == 5 * 2


def test_an_output_that_is_written_to_is_the_same_each_time(source):
    batches = Subject(around(), source, CPU).batches(epoch=0)
    training = suffix_training(Subject(around(), source, CPU), 2, batches)
    training.optimizer.param_groups[0]["lr"] = 0.0
    losses, endless = [], itertools.cycle(batches)
    for _ in range(2 * len(batches)):
        training.take_step(endless)
        losses.append(training.loss.item())
    assert losses[: len(batches)] == losses[len(batches) :]


def test_a_layer_whose_module_is_never_called_has_no_limit(source):
    batches = Subject(toys.uncuttable(), source, CPU).batches(epoch=0)
    with pytest.raises(UsageError, match="layer '0' is used without a call of its module"):
        suffix_training(Subject(toys.uncuttable(), source, CPU), 1, batches)
