"""One training under way: its parts, one step of it, its scores, and its state."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.training.device import Clock, Precision
from collect.training.optimizer import make_optimizer, make_scheduler
from collect.training.seeding import random_state, seed_everything, set_random_state
from collect.workloads.recipe import Recipe, Workload
from data.sources.base import Batch, Source, generator_for
from predictor.errors import UsageError
from predictor.layers.layer import Layer, layers_of

Scores: TypeAlias = Literal["epoch", "end"]
CHECK_EVERY = 20
"""Steps between checks of the loss on a GPU, each of which waits for the device. A CPU checks at every step."""
_TEST_BATCH = 256


class Training:
    """A training under way.

    Hooks may read all of it, freeze parameters, hold weights at zero, set `around_forward`, `on_answers`, `weigh` and
    `among`, and call `begin_epoch`, `finish`, `stop` and `untimed`. Building it seeds all global random generators and
    makes the model; no step is taken yet.

    Args:
        workload: The model, its source and its recipe.
        source: The workload's source, loaded.
        seed: Of the initial weights, the order of the samples, augmentation and dropout.
        device: Where to train.
        budget: The share of the recipe's steps to take.
        rescaled: Whether the schedule is rescaled to these steps; otherwise it is cut off after them.
        scores: Test after each "epoch", or at the "end" alone, for workloads whose test takes as long as the training.
        left_out: The share of the training samples that an epoch leaves out, from 0 to below 1.
        cooldown: The last share of the steps over which the learning rate falls on a straight line to zero.
        expected: The share of the recipe's steps that make a whole training, where a hook leaves out a number of
            samples that is not known before.
    """

    def __init__(
        self,
        workload: Workload,
        source: Source,
        *,
        seed: int,
        device: torch.device,
        budget: float = 1.0,
        rescaled: bool = True,
        scores: Scores = "epoch",
        left_out: float = 0.0,
        cooldown: float = 0.0,
        expected: float = 1.0,
    ) -> None:
        recipe = workload.recipe
        self._scores = scores
        self.workload = workload
        self.source = source
        self.seed = seed
        self.device = device
        self.cooldown = cooldown
        self.steps_per_epoch = steps_per_epoch(source, recipe, left_out)
        """Of an epoch as it is planned; that of the epoch under way is `epoch_steps`."""
        self.planned_steps = _total_steps(recipe, self.steps_per_epoch, 1.0, expected)
        """Optimizer steps of the whole training at a budget of 1."""
        self.total_steps = _total_steps(recipe, self.steps_per_epoch, budget, expected)
        self.among = _some_of(source, left_out, seed)
        """Ids of the samples of an epoch, ascending; None for all. In the last step of an epoch a hook may replace them
        by as many others, or call `begin_epoch`."""
        self.samples_an_epoch = None if self.among is None else len(self.among)
        """The number of samples that an epoch is planned with, where some are left out; None for all."""
        self.epoch_steps = self.steps_per_epoch
        """Optimizer steps of the epoch under way."""
        self._epochs_before, self._began = 0, 0  # whole epochs, and steps, before the epochs of `epoch_steps` steps
        seed_everything(seed)
        # Built on the CPU, so that every device starts from the same weights.
        self.model = workload.model(source).to(device).to(memory_format=self._memory_format(source.shape))
        self.optimizer = make_optimizer(self.model, recipe)
        scheduled = self.total_steps if rescaled else self.planned_steps
        self.scheduler = make_scheduler(self.optimizer, recipe, scheduled, self.total_steps, cooldown)
        self.precision = Precision(device, recipe.amp)
        self.clock = Clock(device)
        self.step = 0
        """Optimizer steps done."""
        self.loss = torch.tensor(math.nan, device=device)
        """Training loss of the last step: one number, on the device, without a graph."""
        self.curve: list[dict[str, float]] = []
        """One row after each epoch and at the end: step, epoch (as a fraction), train_loss (the mean minimised loss
        since the row before), test_loss (plain cross entropy), test_accuracy, train_seconds."""
        self.around_forward: Callable[[Tensor], contextlib.AbstractContextManager[Any]] = _no_context
        """A context around the model's call on each training batch; it receives the batch's ids_B. A hook may set it at
        the start. Tests and hooks' own calls are outside."""
        self.on_answers: Callable[[Tensor, Tensor], None] | None = None
        """Called after the forward pass of each training batch with ids_B, on the CPU, and right_B, bool, on the
        device: which samples were classified correctly. A hook may set it at the start."""
        self.weigh: Callable[[Tensor, Tensor], Tensor] | None = None
        """Called with each training batch's ids_B, on the CPU, and loss_B, on the device and without a graph. Returns
        the weights_B with which the losses are multiplied before their mean is minimised. A hook may set it at the
        start; without it every sample has a weight of 1."""
        self.status: Literal["running", "finished", "diverged", "stopped"] = "running"
        """diverged: the loss is not finite. stopped: a hook called `stop`."""
        self.stop_reason = ""
        """The argument of `stop`."""
        self._loss_sum = torch.zeros((), device=device)
        self._losses = 0

    @property
    def recipe(self) -> Recipe:
        """The workload's recipe."""
        return self.workload.recipe

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The model's freezable layers, in execution order on two samples."""
        return layers_of(self.model, self.formatted(self.source.probe(2, self.device)))

    @property
    def running(self) -> bool:
        """Whether the status is "running"."""
        return self.status == "running"

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self._epochs_before + (self.step - self._began) // self.epoch_steps

    @property
    def epochs(self) -> float:
        """Epochs done, as a fraction."""
        return self._epochs_before + (self.step - self._began) / self.epoch_steps

    @property
    def scores_due(self) -> bool:
        """Whether it is time to test."""
        return self.epoch_ended if self._scores == "epoch" else self.step == self.total_steps

    @property
    def epoch_ended(self) -> bool:
        """Whether an epoch or the training has just ended."""
        return (self.step - self._began) % self.epoch_steps == 0 or self.step == self.total_steps

    @property
    def lr(self) -> float:
        """In a hook: the learning rate of the last step; before the first, that of the first."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def train_seconds(self) -> float:
        """Wall-clock seconds of training so far: data, steps and hooks; not tests, checkpoints and `untimed` spans."""
        return self.clock.wall_seconds

    @property
    def cpu_seconds(self) -> float:
        """The same in CPU seconds of this process, over all its threads."""
        return self.clock.cpu_seconds

    def untimed(self) -> contextlib.AbstractContextManager[None]:
        """A context whose time does not count as training time, for a hook's own work."""
        return self.clock.paused()

    def finish(self) -> None:
        """In a hook's `on_step`: make this step the last, as if the training had been planned so long."""
        self.total_steps = self.step

    def begin_epoch(self, among: Tensor | None, steps: int) -> None:
        """In a hook, in the last step of an epoch: give the next ones other samples, and perhaps more or fewer of them.

        Args:
            among: Ascending ids of the samples; None for all.
            steps: The most optimizer steps of such an epoch. It has fewer where the samples make no more.
        """
        self._epochs_before, self._began = self.epoch, self.step
        size = self.source.size("train") if among is None else len(among)
        self.among = among
        self.epoch_steps = max(1, min(steps, size // (self.recipe.batch_size * self.recipe.accumulate)))

    def stop(self, reason: str) -> None:
        """In a hook: end the training after this step, with the scores so far and the status "stopped"."""
        self.status, self.stop_reason = "stopped", reason

    def batches(self) -> Iterator[Batch]:
        """The remaining batches of the current epoch."""
        start = (self.step - self._began) % self.epoch_steps * self.recipe.accumulate
        return self.source.batches(
            "train",
            self.recipe.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=True,
            augment=self.recipe.augment,
            start=start,
            device=self.device,
            drop_last=True,
            among=self.among,
        )

    def take_step(self, batches: Iterator[Batch]) -> bool:
        """Take one optimizer step on the next `accumulate` batches. The gradients stay until `zero_grad`.

        Returns:
            False, with no step taken, for a loss that is found not to be finite: the training has diverged.
        """
        loss = torch.zeros((), device=self.device)
        for _ in range(self.recipe.accumulate):
            ids_B, inputs, labels_B = next(batches)
            with self.precision.forward():
                with self.around_forward(ids_B):
                    logits_BC = self._logits(inputs)
                if self.on_answers is not None:
                    self.on_answers(ids_B, logits_BC.detach().argmax(dim=1) == labels_B)
                part = self._loss(ids_B, logits_BC, labels_B)
            self.precision.backward(part / self.recipe.accumulate)
            loss += part.detach() / self.recipe.accumulate
        self.loss = loss
        self._loss_sum += loss
        self._losses += 1
        if self._check_due() and not math.isfinite(self._loss_sum.item()):
            self.status = "diverged"
            return False
        self.precision.update(self.optimizer, self.model.parameters(), self.recipe.clip_norm)
        self.step += 1
        return True

    def loss_of(self, inputs: Tensor, labels_B: Tensor) -> Tensor:
        """The loss that is minimised, of one batch, with its graph. Takes no step."""
        with self.precision.forward():
            return F.cross_entropy(self._logits(inputs), labels_B, label_smoothing=self.recipe.label_smoothing)

    def score(self) -> None:
        """Test the model and add a row to `curve`, or find that the training has diverged."""
        test_loss, test_accuracy = self.test()
        train_loss = self._loss_sum.item() / self._losses
        if not (math.isfinite(test_loss) and math.isfinite(train_loss)):
            self.status = "diverged"
            return
        self.curve.append(
            {
                "step": self.step,
                "epoch": self.epochs,
                "train_loss": train_loss,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "train_seconds": self.train_seconds,
            }
        )
        self._loss_sum.zero_()
        self._losses = 0

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Mean cross entropy and accuracy over the test samples."""
        self.model.eval()
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for _, inputs, labels_B in self.source.batches("test", _TEST_BATCH, shuffle=False, device=self.device):
            with self.precision.forward():
                logits_BC = self._logits(inputs).float()
            loss += F.cross_entropy(logits_BC, labels_B, reduction="sum")
            correct += (logits_BC.argmax(dim=1) == labels_B).sum()
        self.model.train()
        size = self.source.size("test")
        return loss.item() / size, correct.item() / size

    def state_dict(self) -> dict[str, Any]:
        """The whole state to resume from, with the global random generators."""
        parts = ("model", "optimizer", "scheduler", "clock")
        return {
            **{name: getattr(self, name).state_dict() for name in parts},
            "scaler": self.precision.scaler.state_dict(),
            "random": random_state(),
            "step": self.step,
            "curve": self.curve,
            "loss": [self.loss, self._loss_sum, self._losses],
            "epoch": [self._epochs_before, self._began, self.epoch_steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of the same training."""
        for name in ("model", "optimizer", "scheduler", "clock"):
            getattr(self, name).load_state_dict(state[name])
        if state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        loss, loss_sum, self._losses = state["loss"]
        self.loss, self._loss_sum = loss.to(self.device), loss_sum.to(self.device)
        self.step, self.curve = state["step"], list(state["curve"])
        # Checkpoints of earlier versions are of trainings whose epochs are all alike.
        self._epochs_before, self._began, self.epoch_steps = state.get("epoch", (0, 0, self.steps_per_epoch))
        set_random_state(state["random"])

    def _loss(self, ids_B: Tensor, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing
        if self.weigh is None:
            return F.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing)
        loss_B = F.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing, reduction="none")
        return (self.weigh(ids_B, loss_B.detach()) * loss_B).mean()

    def _logits(self, inputs: Tensor) -> Tensor:
        logits_BC: Tensor = self.model(self.formatted(inputs))
        return logits_BC

    def formatted(self, inputs: Tensor) -> Tensor:
        """The inputs in the memory format that the model gets them in."""
        return inputs.contiguous(memory_format=self._memory_format(inputs.shape[1:]))

    def _check_due(self) -> bool:
        return self.device.type == "cpu" or (self.step + 1) % CHECK_EVERY == 0

    def _memory_format(self, shape: tuple[int, ...]) -> torch.memory_format:
        images = len(shape) == 3
        return torch.channels_last if images and self.recipe.channels_last else torch.contiguous_format


def _no_context(ids_B: Tensor) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def steps_per_epoch(source: Source, recipe: Recipe, left_out: float = 0.0) -> int:
    """Return the optimizer steps of an epoch that leaves out a share of the training samples.

    Raises:
        UsageError: Not a share, or too few samples left for one step.
    """
    size, samples = _kept(source, left_out), recipe.batch_size * recipe.accumulate
    if samples > size:
        rest, cure = (f" beside the share left out, {left_out}", ", or leave out less") if left_out else ("", "")
        raise UsageError(
            f"batch_size={recipe.batch_size}, accumulate={recipe.accumulate}: a step wants {samples} samples and "
            f"{source.name} has {size}{rest}: lower them{cure}"
        )
    return size // samples


def _kept(source: Source, left_out: float) -> int:
    if not 0 <= left_out < 1:
        raise UsageError(f"left_out={left_out}: give a share of the training samples, from 0 to below 1")
    size = source.size("train")
    return size - round(left_out * size)


def _some_of(source: Source, left_out: float, seed: int) -> Tensor | None:
    """Ascending ids of the samples that a training starts with, drawn by its seed; None for all."""
    size, kept = source.size("train"), _kept(source, left_out)
    if kept == size:
        return None
    order_N = torch.randperm(size, generator=generator_for("left out", seed))
    return order_N[:kept].sort().values


def _total_steps(recipe: Recipe, steps_per_epoch: int, budget: float, expected: float) -> int:
    if not 0 < budget <= 1:
        raise UsageError(f"budget={budget}: give a share of the recipe's steps, above 0 and at most 1")
    return max(1, round(budget * expected * recipe.epochs * steps_per_epoch))


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter, by name."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}
