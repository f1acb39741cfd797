"""Policies that answer what a test wrote down."""

from collections.abc import Iterable, Mapping

from predictor import FreezePolicy
from predictor.policies.base import View
from predictor.policies.measuring.first_look import FirstLook


class Script(FreezePolicy):
    """Answers what stands in `answers` for a step, and otherwise what is frozen already."""

    def __init__(self, answers: Mapping[int, Iterable[int]]) -> None:
        self.answers = answers

    def decide(self, view: View) -> frozenset[int]:
        return frozenset(self.answers.get(view.step, view.frozen))


class WatchingScript(Script):
    """Notes too whether gradients stood after each step."""

    def __init__(self, answers: Mapping[int, Iterable[int]]) -> None:
        super().__init__(answers)
        self.observed: list[tuple[int, bool]] = []

    def observe(self, view: View) -> None:
        heads = [view.layers[index].own[0] for index in view.active]
        self.observed.append((view.step, all(own.grad is not None for own in heads)))


class LookingScript(Script):
    """Answers at step 0 only where it gets a look, and notes the looks and whether FLOPs were known then."""

    wants_look = True
    wants_flops = True

    def __init__(self, answers: Mapping[int, Iterable[int]]) -> None:
        super().__init__(answers)
        self.looks: list[FirstLook] = []
        self.counted: list[bool] = []

    def decide(self, view: View) -> frozenset[int]:
        if view.look is not None:
            self.looks.append(view.look)
            self.counted.append(view.flops is not None)
        return super().decide(view) if view.look or view.step else frozenset()
