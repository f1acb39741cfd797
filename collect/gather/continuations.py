"""The job of gathering outcomes: one run, and its continuations with layers frozen."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from collect.gather.continuation_plan import Choices, Continuation, planned
from collect.gather.gathering import attempted
from collect.gather.plan import RunConfig
from collect.training.device import deterministic, pick_device
from collect.training.loop import Hook, Training, train
from collect.training.provenance import determinism, hardware, versions
from collect.training.seeding import seed_everything
from data.outcomes.records import Outcome, OutcomeFolder, Result, outcome_of, read_outcomes, write_outcomes
from data.sources import load_source
from predictor.controller import FreezeController
from predictor.layers.flops import count_flops
from predictor.model.first_look import FirstLook
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.first_look import look_at
from predictor.shared.files import append_json_line, read_json_lines, written_whole


def record_outcomes(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Do the missing trainings of one run, write the run's file, and return its figures.

    Outcomes are kept as they come, and so are the run's states at the chosen steps: after a kill, only the training
    that was under way is done again.

    Args:
        payload: The run's `id`, its `config` (`RunConfig.as_dict`), `choices` (`Choices.as_dict`) and `device`.
        folder: The root of the `OutcomeFolder`.
        progress: Receives the share of the missing steps that is done.
    """
    files, run_id = OutcomeFolder(folder), payload["id"]

    def attempt() -> list[Outcome]:
        device = pick_device(payload["device"])
        with deterministic(device) as without:
            outcomes = _Run(payload, files, progress).finish()
            if device.type != "cpu":  # which always gives the same
                facts = {**outcomes[0].facts, "determinism": {**determinism(), "without": sorted(set(without))}}
                outcomes[0] = replace(outcomes[0], facts=facts)
        write_outcomes(files.run(run_id), outcomes)
        shutil.rmtree(files.under_way(run_id), ignore_errors=True)
        return outcomes

    def discard_states() -> None:
        for path in files.states(run_id):
            path.unlink()

    run_itself, *others = attempted(files.log(run_id), attempt, discard_states)
    return {
        "status": run_itself.result.status,
        "final_loss": run_itself.result.final_loss,
        "continuations": len(others),
        "diverged": sum(outcome.result.status == "diverged" for outcome in others),
    }


class Branch(Hook):
    """Continues a run from a step with layers frozen, or with the samples in another order.

    Args:
        step: The step to continue from; 0 is before the first.
        layers: Indices of the layers that are frozen from `step` on.
        order_seed: Replaces the training's seed from `step` on, and seeds the global random generators. This hook alone
            may do so: the question is what chance would have made of the run.
        stop_at: The step at which the training stops, so that its state is saved; None for its end.
    """

    def __init__(
        self, step: int = 0, layers: tuple[int, ...] = (), order_seed: int | None = None, stop_at: int | None = None
    ) -> None:
        self._step, self._layers = step, layers
        self._order_seed, self._stop_at = order_seed, stop_at

    def on_start(self, training: Training) -> None:
        """Freeze the layers, for a continuation from step 0."""
        self._training = training
        self._loss_sum = torch.zeros((), device=training.device)
        self._losses = 0
        self._controller = FreezeController(
            training.model,
            training.optimizer,
            _FrozenFrom(self._step, self._layers),
            total_steps=training.total_steps,
            layers=training.layers,
            say=None,
        )
        if self._step == 0:
            if self._layers:  # whose BatchNorms see some data before they freeze
                self._controller.look(training.batches(), lambda batch: training.loss_of(*batch[1:]))
            self._reorder()

    def on_step(self, training: Training) -> None:
        """Add up the loss of the last epoch, keep the layers frozen, and stop where asked to."""
        if training.step > training.total_steps - training.steps_per_epoch:
            self._loss_sum += training.loss
            self._losses += 1
        self._controller.step()
        if training.step == self._stop_at:
            training.stop("a state to continue from")

    def on_end(self, training: Training) -> None:
        """Close the controller."""
        self._controller.close()

    @property
    def result(self) -> Result:
        """The result of the training, after its end."""
        if self._training.status != "finished":
            return Result("diverged")
        last = self._training.curve[-1]
        return Result("finished", last["test_loss"], last["test_accuracy"], self._loss_sum.item() / self._losses)

    def state_dict(self) -> dict[str, Any]:
        """The sums of the last epoch's loss."""
        return {"loss_sum": self._loss_sum, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state: the layers freeze before the next step."""
        self._loss_sum = state["loss_sum"].to(self._training.device)
        self._losses = state["losses"]
        here = {"step": self._training.step, "frozen": list(self._layers)}
        self._controller.load_state_dict({**self._controller.state_dict(), **here})
        self._reorder()

    def _reorder(self) -> None:
        if self._order_seed is not None:
            self._training.seed = self._order_seed
            seed_everything(self._order_seed)


def _first_look(training: Training) -> FirstLook | None:
    """What the first batches of a training say of its layers before a step is taken."""
    batches = training.batches()  # of ids, inputs and labels
    return look_at(training.model, training.layers, batches, lambda batch: training.loss_of(*batch[1:]))


class _FrozenFrom(FreezePolicy):
    """Freezes the same layers from one step on."""

    wants_look = True

    def __init__(self, step: int, layers: tuple[int, ...]) -> None:
        self._step, self._layers = step, frozenset(layers)

    def decide(self, view: View) -> frozenset[int]:
        """Return the layers, or nothing before that step."""
        return self._layers if view.step >= self._step else frozenset()


class _Run:
    """A run, its known outcomes, and the trainings that are missing."""

    def __init__(self, payload: dict[str, Any], files: OutcomeFolder, progress: Callable[[float], None]) -> None:
        self._id, self._config, self._device = payload["id"], payload["config"], payload["device"]
        self._run, self._choices = RunConfig.from_dict(self._config), Choices.from_dict(payload["choices"])
        self._files, self._progress = files, progress
        self._source = load_source(self._run.workload.source, train_samples=self._run.workload.recipe.train_samples)
        # Not trained: it has the layers, the number of steps and the FLOPs.
        first = Training(self._run.workload, self._source, seed=self._run.seed, device=pick_device(self._device))
        self._total = first.total_steps
        self._names = [layer.name for layer in first.layers]
        self._look = _first_look(first)
        self._flops = count_flops(first.model, first.layers, (self._source.probe(2, first.device),), {})
        self._whole, *self._branches = planned(self._choices, self._total, len(self._names), self._run.seed)
        self._known = {(outcome.step, outcome.kind, outcome.layers): outcome for outcome in self._recorded()}
        self._missing = [branch for branch in self._branches if branch.key not in self._known]
        left = [*self._missing, *(() if self._whole.key in self._known else (self._whole,))]
        self._steps_left = sum(self._total - training.step for training in left)
        self._steps_done = 0

    def finish(self) -> list[Outcome]:
        """Return all outcomes of the run, those of earlier choices too: the run itself, then the others by step."""
        unfrozen = self._train_run()
        if unfrozen.status == "finished":
            for branch in self._missing:
                self._note(branch, self._train_branch(branch), unfrozen)
        run_itself = self._known.pop(self._whole.key)
        facts = {"config": self._config, "choices": self._choices.as_dict()}
        facts |= {"versions": versions(), "hardware": hardware()}
        facts |= {} if self._look is None else {"look": self._look.as_dict()}
        return [replace(run_itself, facts=facts), *(outcome for _, outcome in sorted(self._known.items()))]

    def _recorded(self) -> list[Outcome]:
        """Outcomes of an earlier gathering with other choices, and of one that was killed."""
        path = self._files.run(self._id)
        done = list(read_outcomes(path)) if path.exists() else []
        for row in read_json_lines(self._files.so_far(self._id)):
            with contextlib.suppress(ValueError):  # of another version: this training is repeated
                done.append(outcome_of(row))
        return done

    def _train_run(self) -> Result:
        """Train the run itself, keep its state at the steps that are needed, and return its result."""
        known = self._known.get(self._whole.key)
        start: Path | None = None
        for step in sorted({branch.step for branch in self._missing} - {0}):
            state = self._files.state(self._id, step)
            if not state.exists() and (known is None or known.result.status == "finished"):
                if self._train(Branch(stop_at=step), start).status == "diverged":
                    return self._note(self._whole, Result("diverged"), Result("diverged"))
                os.replace(self._files.state_in_use(self._id), state)
            start = state
        if known is not None:
            return known.result
        hook = Branch()
        self._train(hook, start)
        return self._note(self._whole, hook.result, hook.result)

    def _train_branch(self, branch: Continuation) -> Result:
        """Train a continuation to the end."""
        hook = Branch(branch.step, branch.layers, self._order_seed(branch) if branch.kind == "noise" else None)
        self._train(hook, self._files.state(self._id, branch.step) if branch.step else None)
        return hook.result

    def _train(self, hook: Branch, start: Path | None) -> Training:
        """Train from a state, or from the beginning. A training that stops leaves its state in `state_in_use`."""
        copy = self._files.state_in_use(self._id)
        copy.unlink(missing_ok=True)
        if start is not None:
            with written_whole(copy) as part:
                shutil.copyfile(start, part)
        return train(
            self._run.workload,
            seed=self._run.seed,
            hooks=(hook,),
            device=self._device,
            checkpoint=copy,
            checkpoint_seconds=math.inf,
            progress=self._report,
            source=self._source,
            scores="end",
        )

    def _report(self, step: int, total_steps: int) -> None:
        self._steps_done += 1
        # States that are made anew are more steps than planned.
        self._progress(min(self._steps_done / self._steps_left, 1.0))

    def _note(self, branch: Continuation, result: Result, unfrozen: Result) -> Result:
        outcome = Outcome(
            run_id=self._id,
            workload=self._run.reference,
            family=self._run.workload.family,
            source=self._run.workload.source,
            seed=self._run.seed,
            kind=branch.kind,
            step=branch.step,
            total_steps=self._total,
            layers=branch.layers,
            layer_names=tuple(self._names[index] for index in branch.layers),
            layer_count=len(self._names),
            order_seed=self._order_seed(branch),
            flops_share=self._flops.share(frozenset(branch.layers)),
            result=result,
            unfrozen=unfrozen,
        )
        append_json_line(self._files.so_far(self._id), outcome.as_dict())
        self._known[branch.key] = outcome
        return result

    def _order_seed(self, branch: Continuation) -> int:
        """The run's seed; for noise, another one at each step."""
        return self._run.seed + 1 + branch.step if branch.kind == "noise" else self._run.seed
