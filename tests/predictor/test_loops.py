"""Training loops as people write them: each freezes, unfreezes, stops, goes on from what it saved, and ends equal."""

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from predictor import FreezeController, FreezePolicy
from predictor.freezing.wrappers import has_gradients

STEPS = 10
PHASES = {2: {0}, 4: {0, 1}, 8: {1}}


class Script(FreezePolicy):
    """Answers what the test wrote down for each step, and notes whether gradients stood."""

    def __init__(self, answers):
        self.answers, self.observed = answers, []

    def observe(self, view):
        self.observed.append(all(view.layers[index].own[0].grad is not None for index in view.active))

    def decide(self, view):
        return frozenset(self.answers.get(view.step, view.frozen))


class Plain:
    """A loop with AdamW and OneCycleLR. The others change what they are about."""

    micro_batches = 1

    def __init__(self, model):
        self.model = model
        self.optimizers = self.make_optimizers()
        self.schedules = [lr_scheduler.OneCycleLR(optimizer, 0.02, 2 * STEPS) for optimizer in self.optimizers]
        self.controller = FreezeController(model, self.optimizers, Script(PHASES), total_steps=STEPS)
        self.done = 0
        self.watched = []

    def make_optimizers(self):
        return [torch.optim.AdamW(self.model.parameters(), lr=0.01)]

    def run(self, until):
        while self.done < until:
            for micro in range(self.micro_batches):
                torch.manual_seed(100 * self.done + micro)
                self.backward(torch.randn(8, 1, 8, 8), torch.randint(3, (8,)))
            self.update()
            self.controller.step()
            for schedule in self.schedules:
                schedule.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.done += 1
            self.watched.append((self.controller.frozen, self.weights()))
        return self

    def backward(self, x, y):
        (F.cross_entropy(self.model(x), y) / self.micro_batches).backward()

    def update(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def parts(self):
        """All that has a state."""
        return [self.model, *self.optimizers, *self.schedules, self.controller]

    def weights(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


class Accumulating(Plain):
    """Gradients of three batches added up, and clipped."""

    micro_batches = 3

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        super().update()


class HalfPrecision(Plain):
    """Autocast to bfloat16."""

    def backward(self, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()


class Scaled(Plain):
    """Autocast to float16 under a GradScaler, one of whose steps is skipped for a gradient that is infinite."""

    def __init__(self, model):
        super().__init__(model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def backward(self, x, y):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(self.model(x), y)
        self.scaler.scale(loss * (float("inf") if self.done == 5 else 1)).backward()

    def update(self):
        for optimizer in self.optimizers:
            if has_gradients(optimizer):
                self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            if has_gradients(optimizer):
                self.scaler.step(optimizer)
        self.scaler.update()

    def parts(self):
        return [*super().parts(), self.scaler]


class SeveralOptimizers(Plain):
    """One optimizer for the first two layers, another kind for the rest: the first becomes wholly frozen."""

    def make_optimizers(self):
        front, rest = self.model.body[:5], [*self.model.body[5:].parameters(), *self.model.head.parameters()]
        return [torch.optim.SGD(front.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)]


class ScaledSeveralOptimizers(SeveralOptimizers, Scaled):
    """Both, which takes `has_gradients`."""


class Averaged(Plain):
    """A moving average of the weights and statistics beside the training."""

    def __init__(self, model):
        super().__init__(model)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    def update(self):
        super().update()
        self.average.update_parameters(self.model)

    def parts(self):
        return [*super().parts(), self.average]


LOOPS = [
    Plain,
    Accumulating,
    HalfPrecision,
    Scaled,
    SeveralOptimizers,
    ScaledSeveralOptimizers,
    Averaged,
]


def saved_and_resumed(loop, stop, model, fresh, path):
    first = loop(model).run(stop)
    torch.save([part.state_dict() for part in first.parts()], path)
    second = loop(fresh)
    for part, state in zip(second.parts(), torch.load(path, weights_only=True), strict=True):
        part.load_state_dict(state)
    second.done = stop
    return second


def equal(first, second):
    return all(
        torch.equal(a, b)
        for one, other in zip(first.parts(), second.parts(), strict=True)
        if isinstance(one, torch.nn.Module)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize("loop", LOOPS)
def test_save_load_go_on_equals_the_unbroken_run_bit_for_bit(loop, stop, make_toy, tmp_path):
    unbroken = loop(make_toy()).run(STEPS)
    resumed = saved_and_resumed(loop, stop, make_toy(), make_toy(seed=5), tmp_path / "checkpoint.pt").run(STEPS)
    assert equal(unbroken, resumed)
    assert resumed.controller.history == unbroken.controller.history


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_frozen_stands_still_and_all_else_moves(loop, make_toy):
    training = loop(make_toy()).run(STEPS)
    assert [sorted(frozen) for frozen, _ in training.watched] == [[]] + [[0]] * 2 + [[0, 1]] * 4 + [[1]] * 3
    assert training.controller.policy.observed == [True] * STEPS
    ids = [id(parameter) for parameter in training.model.parameters()]
    # A bias in front of BatchNorm changes nothing, and its gradient is rounding.
    biases = {ids.index(id(training.model.body[index].bias)) for index in (0, 3)}
    for step in range(1, STEPS):
        (frozen, before), (_, after) = training.watched[step - 1 : step + 1]
        held = {ids.index(id(p)) for index in frozen for p in training.controller.layers[index].parameters()}
        skipped = isinstance(training, Scaled) and step == 5
        still = {index for index in range(len(ids)) if torch.equal(before[index], after[index])}
        assert still - biases == (set(range(len(ids))) if skipped else held) - biases, step
        assert held <= still


def test_a_scaler_cannot_step_an_optimizer_that_is_wholly_frozen(make_toy):
    """What `has_gradients` is for. The day that this fails, it may go."""
    training = ScaledSeveralOptimizers(make_toy()).run(5)
    training.backward(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    assert [has_gradients(optimizer) for optimizer in training.optimizers] == [False, True]
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        training.scaler.step(training.optimizers[0])


def test_accumulated_gradients_are_those_of_the_large_batch(make_toy):
    """Freezing acts between optimizer steps alone: partial gradients are never left over."""

    def train(parts):
        model = make_toy()
        model.eval()  # BatchNorm and dropout look at the batch
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = FreezeController(model, optimizer, Script({1: {0}, 3: ()}), total_steps=4)
        for step in range(4):
            torch.manual_seed(step)
            x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
            for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(some_x), some_y) / parts).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        return model.state_dict()

    torch.testing.assert_close(train(4), train(1))


def test_an_average_made_while_layers_are_frozen_is_a_model_of_its_own(make_toy):
    training = Plain(make_toy()).run(5)
    average = AveragedModel(training.model)
    training.run(9)
    average.update_parameters(training.model)
    assert training.model.body[1].training  # unfrozen by now
    average.train()
    assert average.module.body[1].training  # a copy is not held
    assert torch.equal(average.module.body[0].weight, training.model.body[0].weight)  # the first average is a copy


def test_accelerate_saves_and_loads_the_controller_with_the_rest(make_toy, tmp_path):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    class Accelerated(Plain):
        micro_batches = 2

        def __init__(self, model):
            super().__init__(model)
            self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.micro_batches)
            self.model, optimizer, schedule = self.accelerator.prepare(model, self.optimizers[0], self.schedules[0])
            self.controller = FreezeController(self.model, optimizer, Script(PHASES), total_steps=STEPS)
            self.accelerator.register_for_checkpointing(self.controller)
            self.prepared = optimizer, schedule

        def run(self, until):
            optimizer, schedule = self.prepared
            while self.done < until:
                for micro in range(self.micro_batches):
                    torch.manual_seed(100 * self.done + micro)
                    with self.accelerator.accumulate(self.model):
                        self.accelerator.backward(
                            F.cross_entropy(self.model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3)
                        )
                        optimizer.step()
                        if self.accelerator.sync_gradients:
                            self.controller.step()
                        schedule.step()
                        optimizer.zero_grad()
                self.done += 1
            return self

    unbroken = Accelerated(make_toy()).run(STEPS)
    Accelerated(make_toy()).run(6).accelerator.save_state(tmp_path)
    resumed = Accelerated(make_toy(seed=5))
    resumed.accelerator.load_state(tmp_path)
    resumed.done = 6
    resumed.run(STEPS)
    assert unbroken.controller.policy.observed == [True] * STEPS
    assert resumed.controller.history == unbroken.controller.history
    assert equal(unbroken, resumed)
