"""One run's job of gathering outcomes, in its slot's process: the run, and again from its points with layers frozen."""

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
from collect.gather.plan import RunConfig
from collect.training.checkpoint import CheckpointFault
from collect.training.device import pick_device
from collect.training.loop import Hook, Training, train
from collect.training.provenance import hardware, versions
from collect.training.seeding import seed_everything
from data.outcomes.records import Outcome, OutcomeFolder, Result, outcome_of, read_outcomes, write_outcomes
from data.sources import load_source
from predictor.controller import FreezeController
from predictor.layers.flops import count_flops
from predictor.policies.base import FreezePolicy, View
from predictor.shared.files import append_json_line, held, read_json_lines, written_whole

_LOCK_SECONDS = 20.0


def record_outcomes(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Do what is missing of the run of `payload`, write its file into the folder, and return its figures.

    payload: `config` of the run (`RunConfig.as_dict`), its `id`, `choices` (`Choices.as_dict`) and `device`.
    """
    files, run_id = OutcomeFolder(folder), payload["id"]
    # Against a second gather, and against a slot that outlives its killed parent for a moment.
    with held(files.log(run_id), "another gather", _LOCK_SECONDS):
        try:
            outcomes = _Run(payload, files, progress).finish()
        except CheckpointFault as fault:  # not a full disk or a missing image: the states outlive those
            print(f"{fault}\nthe run itself starts over; the outcomes so far are kept")
            for path in files.states(run_id):
                path.unlink()
            outcomes = _Run(payload, files, progress).finish()
        write_outcomes(files.run(run_id), outcomes)
        shutil.rmtree(files.under_way(run_id), ignore_errors=True)
    run_itself, *others = outcomes
    return {
        "status": run_itself.result.status,
        "final_loss": run_itself.result.final_loss,
        "continuations": len(others),
        "diverged": sum(outcome.result.status == "diverged" for outcome in others),
    }


class Branch(Hook):
    """Goes on from a step with layers frozen, or with the samples in another order; and takes the last epoch's loss.

    layers: places of those that stand still from `step` on. stop_at: the step at which the training stops, so that its
    state is saved; None for its end. order_seed: of all that is random from `step` on. This once a hook sets the
    training's seed and the global random generators anew: what chance alone would have made of the run is the question.
    """

    def __init__(
        self, step: int = 0, layers: tuple[int, ...] = (), order_seed: int | None = None, stop_at: int | None = None
    ) -> None:
        self._step, self._layers = step, layers
        self._order_seed, self._stop_at = order_seed, stop_at

    def on_start(self, training: Training) -> None:
        """Freeze, where that is to be before the first step."""
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
            self._reorder()

    def on_step(self, training: Training) -> None:
        """Hold the layers still."""
        if training.step > training.total_steps - training.steps_per_epoch:
            self._loss_sum += training.loss
            self._losses += 1
        self._controller.step()
        if training.step == self._stop_at:
            training.stop("a point to go on from")

    def on_end(self, training: Training) -> None:
        """Let go of the layers."""
        self._controller.close()

    @property
    def result(self) -> Result:
        """How the training ended, once it has."""
        if self._training.status != "finished":
            return Result("diverged")
        last = self._training.curve[-1]
        return Result("finished", last["test_loss"], last["test_accuracy"], self._loss_sum.item() / self._losses)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the last epoch's loss."""
        return {"loss_sum": self._loss_sum, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a point: freeze there, before the next step."""
        self._loss_sum = state["loss_sum"].to(self._training.device)
        self._losses = state["losses"]
        here = {"step": self._training.step, "frozen": list(self._layers)}
        self._controller.load_state_dict({**self._controller.state_dict(), **here})
        self._reorder()

    def _reorder(self) -> None:
        if self._order_seed is not None:
            self._training.seed = self._order_seed
            seed_everything(self._order_seed)


class _FrozenFrom(FreezePolicy):
    """Freezes some layers at one step and never changes them."""

    def __init__(self, step: int, layers: tuple[int, ...]) -> None:
        self._step, self._layers = step, frozenset(layers)

    def decide(self, view: View) -> frozenset[int]:
        """The layers, from that step on."""
        return self._layers if view.step >= self._step else frozenset()


class _Run:
    """A run, what is known of its outcomes, and the trainings that are still to be done."""

    def __init__(self, payload: dict[str, Any], files: OutcomeFolder, progress: Callable[[float], None]) -> None:
        self._id, self._config, self._device = payload["id"], payload["config"], payload["device"]
        self._run, self._choices = RunConfig.from_dict(self._config), Choices.from_dict(payload["choices"])
        self._files, self._progress = files, progress
        self._source = load_source(self._run.workload.source, train_samples=self._run.workload.recipe.train_samples)
        # Not trained: to see its layers, its steps and what they cost.
        first = Training(self._run.workload, self._source, seed=self._run.seed, device=pick_device(self._device))
        self._total = first.total_steps
        self._names = [layer.name for layer in first.layers]
        self._flops = count_flops(first.model, first.layers, (self._source.probe(2, first.device),), {})
        self._whole, *self._branches = planned(self._choices, self._total, len(self._names), self._run.seed)
        self._known = {(outcome.step, outcome.kind, outcome.layers): outcome for outcome in self._recorded()}
        self._missing = [branch for branch in self._branches if branch.key not in self._known]
        left = [*self._missing, *(() if self._whole.key in self._known else (self._whole,))]
        self._steps_left = sum(self._total - training.step for training in left)
        self._steps_done = 0

    def finish(self) -> list[Outcome]:
        """All outcomes of the run, those of earlier choices too, in a fixed order: the run itself comes first."""
        unfrozen = self._follow_run()
        if unfrozen.status == "finished":
            for branch in self._missing:
                self._note(branch, self._follow(branch), unfrozen)
        run_itself = self._known.pop(self._whole.key)
        facts = {"config": self._config, "choices": self._choices.as_dict()}
        facts |= {"versions": versions(), "hardware": hardware()}
        return [replace(run_itself, facts=facts), *(outcome for _, outcome in sorted(self._known.items()))]

    def _recorded(self) -> list[Outcome]:
        """What an earlier gathering of other choices, or one that was broken off, has left."""
        path = self._files.run(self._id)
        done = list(read_outcomes(path)) if path.exists() else []
        for row in read_json_lines(self._files.so_far(self._id)):
            with contextlib.suppress(ValueError):  # of another version: done again
                done.append(outcome_of(row))
        return done

    def _follow_run(self) -> Result:
        """Train the run itself, keep its state at the points that are wanted, and say how it ended."""
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

    def _follow(self, branch: Continuation) -> Result:
        """Go on from a point to the end."""
        hook = Branch(branch.step, branch.layers, self._order_seed(branch) if branch.kind == "noise" else None)
        self._train(hook, self._files.state(self._id, branch.step) if branch.step else None)
        return hook.result

    def _train(self, hook: Branch, start: Path | None) -> Training:
        """Train on from a state, or from the beginning; a training that stops leaves its state in the copy in use."""
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
            progress=self._tell,
            source=self._source,
            scores="end",
        )

    def _tell(self, step: int, total_steps: int) -> None:
        self._steps_done += 1
        # More than planned, where states have to be made anew.
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
            layer_names=tuple(self._names[place] for place in branch.layers),
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
        """The run's own but for noise, where each point has another."""
        return self._run.seed + 1 + branch.step if branch.kind == "noise" else self._run.seed
