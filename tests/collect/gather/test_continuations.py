"""Continuations of a run: equal to the unbroken run bit for bit, frozen from a step on, and never done twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collect.gather import continuations
from collect.gather.continuation_plan import Choices
from collect.gather.continuations import Branch, record_outcomes
from collect.gather.plan import RunConfig, read_suite
from collect.training.loop import Training
from data.outcomes.records import OutcomeFolder, read_outcomes
from predictor.errors import FileFault
from tests.collect.inline import MLP, SMALL
from tests.collect.tiny import Losses, Trace, run, same, weights

TOTAL = 18  # six steps an epoch, three epochs
RECIPES = [{}, {"optimizer": "adamw", "lr": 0.01, "augment": True}]
LAYER_0 = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
LAYER_1 = ("linear.weight", "linear.bias")


def state_at(step: int, path: Path, *hooks: Any, **recipe: Any) -> Path:
    stopped = run(Branch(stop_at=step), *hooks, path=path, seconds=1e9, **recipe)
    assert (stopped.status, stopped.step) == ("stopped", step)
    return path


def go_on(branch: Branch, path: Path | None, *hooks: Any, **recipe: Any) -> Training:
    return run(branch, *hooks, path=path, seconds=1e9, **recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("step", [0, 6, 15])
def test_with_nothing_frozen_it_equals_the_unbroken_run_bit_for_bit(
    step: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    whole, branch, path = Branch(), Branch(step), None
    expected = run(whole, **recipe)
    if step:
        path = state_at(step, tmp_path / "state", **recipe)
    assert same(weights(go_on(branch, path, **recipe)), weights(expected))
    assert branch.result == whole.result
    assert branch.result.final_loss == expected.curve[-1]["test_loss"]


def test_the_hook_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    plain, hooked = run(), run(Branch())
    assert same(weights(plain), weights(hooked))


def test_the_loss_of_the_last_epoch_is_taken_across_a_point(tmp_path: Path) -> None:
    losses = Losses()
    whole = Branch()
    run(whole, losses)
    assert whole.result.last_epoch_loss == pytest.approx(sum(losses.losses[12:]) / 6, rel=1e-6)
    branch = Branch(15)
    go_on(branch, state_at(15, tmp_path / "state"))
    assert branch.result.last_epoch_loss == whole.result.last_epoch_loss


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize(("layers", "still", "moving"), [((0,), LAYER_0, LAYER_1), ((1,), LAYER_1, LAYER_0)])
def test_frozen_layers_stand_still_from_the_point_on_and_others_do_not(
    step: int,
    layers: tuple[int, ...],
    still: tuple[str, ...],
    moving: tuple[str, ...],
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    before, after = Trace(weights), Trace(weights)
    path = state_at(step, tmp_path / "state", before, **recipe) if step else None
    training = go_on(Branch(step, layers), path, after, **recipe)
    start: dict[str, Tensor] = before.at("step")[-1] if step else after.at("start")[0]
    assert len(after.at("step")) == TOTAL - step
    for seen in after.at("step"):
        assert all(torch.equal(seen[name], start[name]) for name in still)
        assert not any(torch.equal(seen[name], start[name]) for name in moving if name != "conv.bias")
    held = [training.model.get_parameter(name) for name in still if "running" not in name]
    assert not any(parameter in training.optimizer.state for parameter in held)
    assert training.status == "finished"


def test_noise_parts_at_the_point_and_not_before(tmp_path: Path) -> None:
    traces = {seed: Trace(lambda training: training.loss.item()) for seed in (None, 5, 6)}
    for seed, trace in traces.items():
        go_on(Branch(7, order_seed=seed), state_at(7, tmp_path / f"{seed}", Trace(weights)), trace)
    again = Trace(lambda training: training.loss.item())
    go_on(Branch(7, order_seed=5), state_at(7, tmp_path / "again", Trace(weights)), again)
    assert again.at("step") == traces[5].at("step")
    firsts = [trace.at("step")[0] for trace in traces.values()]
    assert len(set(firsts)) == 3


# The whole job.


SUITE = f"{SMALL}{MLP}seed = 4\n"
CHOICES = Choices((0.0, 0.5), (0.5, 1.0), 1)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """A run of six steps and four layers."""
    return payload_of(tmp_path, SUITE)


def payload_of(tmp_path: Path, text: str, choices: Choices = CHOICES) -> dict[str, Any]:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    (one,) = read_suite(str(path)).runs
    return {"id": one.id, "config": one.as_dict(), "choices": choices.as_dict(), "device": "cpu"}


def breaking_off(after: int) -> Callable[[float], None]:
    """A report of progress that ends the job at a step, counted over all of its trainings."""
    steps = iter(range(after))

    def report(share: float) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    return report


def steps_of(payload: dict[str, Any], folder: Path) -> int:
    """Do the job. Returns the steps that it took."""
    shares: list[float] = []
    record_outcomes(payload, folder, shares.append)
    assert not shares or shares[-1] <= 1
    assert shares == sorted(shares)
    return len(shares)


def test_the_outcomes_of_a_run(job: dict[str, Any], tmp_path: Path) -> None:
    steps = steps_of(job, tmp_path / "out")
    assert steps == 6 + 4 * 6 + 4 * 3
    files = OutcomeFolder(tmp_path / "out")
    outcomes = read_outcomes(files.run(job["id"]))
    assert not files.under_way(job["id"]).exists()
    whole = outcomes[0]
    assert {outcome.run_id for outcome in outcomes} == {RunConfig.from_dict(job["config"]).id}
    assert {outcome.unfrozen for outcome in outcomes} == {whole.result}
    assert whole.facts["config"] == job["config"]
    assert whole.facts["versions"]["torch"]
    assert "determinism" not in whole.facts  # a CPU always gives the same
    assert [outcome.kind for outcome in outcomes].count("noise") == 2
    assert {outcome.step for outcome in outcomes if outcome.kind == "front"} == {0, 3}
    prefix = next(outcome for outcome in outcomes if outcome.kind == "front" and outcome.step == 3)
    assert (prefix.progress, prefix.layers, prefix.layer_count) == (0.5, (0, 1), 4)
    # Four layers and a head of which two stand still: less than a full step, more than the head's alone.
    everything = next(outcome for outcome in outcomes if len(outcome.layers) == 4)
    assert 0.2 < everything.flops_share < prefix.flops_share < whole.flops_share == 1
    losses = [outcome.result.final_loss for outcome in outcomes]
    assert len(set(losses)) == len(losses)


def test_broken_off_again_and_again_it_ends_as_if_unbroken(job: dict[str, Any], tmp_path: Path) -> None:
    """In the run itself, before and behind a point; in continuations; and with a line that was cut short."""
    whole = steps_of(job, tmp_path / "whole")
    files, run_id = OutcomeFolder(tmp_path / "broken"), job["id"]
    for after in (1, 4, 10, 15):
        with pytest.raises(KeyboardInterrupt):
            record_outcomes(job, tmp_path / "broken", breaking_off(after))
        assert not files.run(run_id).exists()
        if files.so_far(run_id).exists():
            with files.so_far(run_id).open("a") as file:
                file.write('{"run_id": "cut sh')
    assert 0 < steps_of(job, tmp_path / "broken") < whole - 20
    expected = OutcomeFolder(tmp_path / "whole").run(run_id)
    assert files.run(run_id).read_bytes() == expected.read_bytes()


def test_further_choices_add_what_is_missing(job: dict[str, Any], tmp_path: Path) -> None:
    steps_of(job, tmp_path / "out")
    path = OutcomeFolder(tmp_path / "out").run(job["id"])
    before = {outcome.key: outcome for outcome in read_outcomes(path)[1:]}
    wider = {**job, "choices": Choices((0.0, 0.5, 0.7), (0.5, 1.0), 1).as_dict()}
    assert steps_of(wider, tmp_path / "out") == 4 + 4 * 2  # the run itself up to the new point
    after = {outcome.key: outcome for outcome in read_outcomes(path)[1:]}
    assert len(after) == len(before) + 4
    assert {key: after[key] for key in before} == before
    assert steps_of(job, tmp_path / "out") == 0
    assert {outcome.key for outcome in read_outcomes(path)[1:]} == set(after)
    fresh = tmp_path / "fresh"
    steps_of(wider, fresh)
    assert read_outcomes(OutcomeFolder(fresh).run(job["id"]))[1:] == read_outcomes(path)[1:]


def test_a_run_that_diverges_has_no_continuations(tmp_path: Path) -> None:
    payload = payload_of(tmp_path, SUITE + "lr = 1e30\nwarmup = 0.0")
    figures = record_outcomes(payload, tmp_path / "out", lambda share: None)
    (whole,) = read_outcomes(OutcomeFolder(tmp_path / "out").run(payload["id"]))
    assert (whole.kind, whole.result.status, whole.result.final_loss) == ("unfrozen", "diverged", None)
    assert figures == {"status": "diverged", "final_loss": None, "continuations": 0, "diverged": 0}


def test_a_state_that_cannot_be_used_is_made_again(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps_of(job, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(job, tmp_path / "broken", breaking_off(40))
    files, run_id = OutcomeFolder(tmp_path / "broken"), job["id"]
    files.state(run_id, 3).write_bytes(b"SmartFRZ checkpoint 1\nrubbish")
    steps_of(job, tmp_path / "broken")
    assert "damaged" in capsys.readouterr().out
    expected = OutcomeFolder(tmp_path / "whole").run(run_id)
    assert files.run(run_id).read_bytes() == expected.read_bytes()


def test_a_full_disk_keeps_the_states_and_the_outcomes_so_far(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(job, tmp_path / "broken", breaking_off(40))
    files, run_id = OutcomeFolder(tmp_path / "broken"), job["id"]
    before = {path: path.read_bytes() for path in (files.state(run_id, 3), files.so_far(run_id))}

    def full(path: Path, content: Any) -> None:
        raise FileFault(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(continuations, "append_json_line", full)
    with pytest.raises(FileFault, match="No space left"):
        record_outcomes(job, tmp_path / "broken", lambda share: None)
    assert {path: path.read_bytes() for path in before} == before


def test_a_lost_continuation_is_an_outcome_too(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen layers can make a training diverge; here the loss is made to."""

    class Lost(Branch):
        def on_step(self, training: Training) -> None:
            super().on_step(training)
            if len(self._layers) == 4 and training.step == 5:
                torch.nn.init.constant_(next(training.model.parameters()), float("nan"))

    monkeypatch.setattr(continuations, "Branch", Lost)
    figures = record_outcomes(job, tmp_path / "out", lambda share: None)
    assert (figures["status"], figures["diverged"]) == ("finished", 2)
    lost = [one for one in read_outcomes(OutcomeFolder(tmp_path / "out").run(job["id"])) if len(one.layers) == 4]
    assert [(one.result.status, one.result.final_loss, one.extra_loss) for one in lost] == [
        ("diverged", None, float("inf"))
    ] * 2
