"""Workloads small enough to count by hand, named as a user names their own (tests.evaluate.toys:NAME), and a hook."""

from torch import Tensor, nn
from torch.nn import functional as F

from collect.training.loop import Hook, Training
from collect.workloads import Recipe, Workload


class Attention(nn.Module):
    """A linear layer on the rows of an 8x8 image, each row attending to all, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(64, 10, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        rows_BTD = self.embed(x_BCHW.squeeze(1))
        mixed_BTD = F.scaled_dot_product_attention(rows_BTD, rows_BTD, rows_BTD)
        logits_BC: Tensor = self.head(mixed_BTD.flatten(1))
        return logits_BC


class Uncalled(nn.Sequential):
    """A hidden layer whose weights are used without a call of it, so that no output of it can be kept."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64), nn.Linear(64, 10))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden, head = self
        logits_BC: Tensor = head(F.linear(x_BCHW.flatten(1), hidden.weight, hidden.bias))
        return logits_BC


def six_linear() -> Workload:
    """Six equal linear layers of 64 x 64."""

    def model(source: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64, bias=False) for _ in range(6)))

    recipe = Recipe(epochs=2, batch_size=10, train_samples=100)
    return Workload("tests.evaluate.toys:six_linear", "toy", model, "digits", recipe)


def attention() -> Workload:
    """One linear layer, attention and the head."""
    recipe = Recipe(epochs=1, batch_size=10, train_samples=100)
    return Workload("tests.evaluate.toys:attention", "toy", lambda _: Attention(), "digits", recipe)


def depthwise() -> Workload:
    """A convolution of 3x3, another on each of its 8 channels alone, and the head."""

    def model(source: object) -> nn.Module:
        convolutions = (nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 64, 10))

    recipe = Recipe(epochs=1, batch_size=10, train_samples=100)
    return Workload("tests.evaluate.toys:depthwise", "toy", model, "digits", recipe)


def uncuttable() -> Workload:
    """A hidden layer that a cache cannot cut off, and the head."""
    recipe = Recipe(epochs=2, batch_size=10, train_samples=100)
    return Workload("tests.evaluate.toys:uncuttable", "toy", lambda _: Uncalled(), "digits", recipe)


def broken() -> Workload:
    """A model that cannot be built."""

    def model(source: object) -> nn.Module:
        raise RuntimeError("this model is broken")

    return Workload("tests.evaluate.toys:broken", "toy", model, "digits", Recipe(epochs=1, train_samples=100))


class StopAt(Hook):
    """Breaks a training off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, training: Training) -> None:
        if training.step == self.step:
            training.stop("for the test")
