"""One trial: what it reports, that freezing is all it changes, and that a lost training loses nothing else."""

import gc
import importlib.metadata
import json

import pytest
import torch

from collect.training.loop import train
from evaluate.trials.config import TrialConfig
from evaluate.trials.freezing import FreezeHook
from evaluate.trials.suite import PolicyEntry
from evaluate.trials.trial import build_workload, run_trial
from predictor.errors import UsageError
from predictor.policies import POLICIES, make_policy
from predictor.policies.base import FreezePolicy
from tests.evaluate import toys

SIX = "tests.evaluate.toys:six_linear"
DEPTHWISE = "tests.evaluate.toys:depthwise"


CHANGES = ("cache", "stop", "lora", "probe", "sieve", "sparse", "infobatch")
"""What an entry may say besides its policy."""


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Lets each trial's garbage collection pass over what the imports have left."""
    gc.freeze()
    yield
    gc.unfreeze()


def trial(tmp_path, policy="none", seed=0, recipe=None, workload=SIX, when="epoch", **options):
    entry = PolicyEntry(
        policy, policy, **{name: options.pop(name) for name in CHANGES if name in options}, options=options
    )
    config = TrialConfig(workload, workload, "toy", "digits", recipe or {}, entry, seed, "cpu", scores=when)
    shares = []
    result = run_trial(json.loads(json.dumps(config.as_payload())), tmp_path, shares.append)
    json.dumps(result, allow_nan=False)  # strict JSON, whatever happened
    return result | {"shares": shares}


def scores(curve):
    return [(row["step"], row["train_loss"], row["test_loss"], row["test_accuracy"]) for row in curve]


def test_none_is_the_plain_training_bit_for_bit(tmp_path):
    plain = train(toys.six_linear(), seed=1, device="cpu")
    result = trial(tmp_path, seed=1)
    assert scores(result["curve"]) == scores(plain.curve)
    assert result["accuracy"] == plain.curve[-1]["test_accuracy"]
    assert result["loss"] == plain.curve[-1]["test_loss"]


def test_a_look_is_counted_and_changes_nothing_else(tmp_path, monkeypatch):
    plain = trial(tmp_path)
    monkeypatch.setattr(FreezePolicy, "wants_look", True)
    result = trial(tmp_path)
    assert scores(result["curve"]) == scores(plain["curve"])
    parts = 8 * 4 / 10  # four samples of each batch of ten
    assert result["flops"] == pytest.approx(plain["flops"] * (1 + parts / plain["steps"]), abs=1)


def test_a_trial_may_be_tested_at_its_end_alone(tmp_path):
    every, end = (trial(tmp_path, recipe={"epochs": 3}, when=when) for when in ("epoch", "end"))
    assert len(every["curve"]) == 3
    assert scores(end["curve"])[0][2:] == scores(every["curve"])[-1][2:]
    assert end["accuracy"] == every["accuracy"]


def test_what_a_trial_reports(tmp_path):
    result = trial(tmp_path, "static", layers=2)
    assert (result["policy"], result["status"], result["error"]) == ("static", "finished", None)
    assert (result["steps"], result["planned_steps"], result["parameters"]) == (20, 20, 6 * 64 * 64)
    assert result["layers"] == ["1", "2", "3", "4", "5"]
    assert [(event["step"], event["frozen"]) for event in result["freezes"]] == [(0, [0, 1])]
    # 6 forward, 4 for weights, 3 for inputs, each 2 * 64 * 64 for each of 10 samples
    step_flops = 13 * 10 * 2 * 64 * 64
    assert result["patterns"] == [{"frozen": [0, 1], "step_flops": step_flops, "steps": 20}]
    assert result["flops"] == 20 * step_flops
    assert result["step_cost"][-1]["step"] == 20
    assert 0 < result["policy_seconds"] < result["train_seconds"]
    assert result["cpu_seconds"] > 0
    assert (result["peak_memory_bytes"] is None) == (result["peak_memory_note"] is not None)
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    assert result["hardware"]["threads"] == torch.get_num_threads()
    assert result["shares"][-1] == 1.0


def test_freezing_is_what_changes_the_outcome(tmp_path):
    frozen, plain = trial(tmp_path, "static", layers=4), trial(tmp_path)
    assert scores(frozen["curve"]) != scores(plain["curve"])
    assert frozen["flops"] < plain["flops"]


def test_the_same_seed_gives_the_same_trial_and_another_another(tmp_path):
    results = [trial(tmp_path, "linear", seed=seed) for seed in (5, 5, 6)]
    assert scores(results[0]["curve"]) == scores(results[1]["curve"]) != scores(results[2]["curve"])
    assert results[0]["freezes"] == results[1]["freezes"] != []


def test_a_shorter_training_takes_fewer_steps_of_those_planned(tmp_path):
    result = trial(tmp_path, "shorter", budget=0.75)
    assert (result["steps"], result["planned_steps"]) == (15, 20)
    assert result["status"] == "finished"


def test_a_training_that_is_broken_off_is_the_full_one_up_to_there(tmp_path):
    full, stopped = trial(tmp_path, "none"), trial(tmp_path, "stopped", budget=0.75)
    assert (stopped["steps"], stopped["planned_steps"], stopped["status"]) == (15, 20, "finished")
    assert stopped["curve"][-1]["step"] == 15
    so_far = [row for row in full["curve"] if row["step"] <= 15]
    assert scores(stopped["curve"])[: len(so_far)] == scores(so_far) != []
    assert scores(stopped["curve"])[-1] != scores(trial(tmp_path, "shorter", budget=0.75)["curve"])[-1]


def test_a_shorter_training_on_a_straight_line_is_that_of_such_a_recipe(tmp_path):
    line = trial(tmp_path, "shorter", budget=0.75, schedule="linear")
    assert scores(line["curve"]) == scores(
        trial(tmp_path, "shorter", recipe={"schedule": "linear"}, budget=0.75)["curve"]
    )
    assert scores(line["curve"]) != scores(trial(tmp_path, "shorter", budget=0.75)["curve"])


def test_a_cool_down_changes_the_last_steps_alone(tmp_path):
    recipe = {"epochs": 4}
    plain, cooled = (trial(tmp_path, "stopped", recipe=recipe, budget=0.75, **more) for more in ({}, {"cooldown": 0.3}))
    assert (plain["steps"], cooled["steps"]) == (30, 30)
    assert scores(cooled["curve"])[:2] == scores(plain["curve"])[:2]  # it begins after step 21
    assert scores(cooled["curve"])[2] != scores(plain["curve"])[2]


def test_a_training_may_end_once_all_layers_are_frozen(tmp_path):
    fronts = {"fronts": [[0.25, 0.4], [0.7, 1.0]]}
    full, ended = trial(tmp_path, "schedule", **fronts), trial(tmp_path, "schedule", stop=True, **fronts)
    assert (ended["steps"], ended["planned_steps"], ended["status"], full["steps"]) == (14, 20, "finished", 20)
    assert ended["flops"] == sum(p["step_flops"] * p["steps"] for p in full["patterns"] if len(p["frozen"]) < 5)
    assert ended["curve"][-1]["step"] == ended["step_cost"][-1]["step"] == 14
    assert scores(ended["curve"])[0] == scores(full["curve"])[0]  # the schedule is the full training's
    assert ended["shares"][-1] == 1.0


def test_a_lost_training_is_recorded_as_such(tmp_path):
    result = trial(tmp_path, "linear", recipe={"lr": 1e30}, start=0.0)
    assert result["status"] == "diverged"
    assert result["accuracy"] is None
    assert result["loss"] is None
    assert "no longer a finite number" in result["error"]
    assert 0 < result["steps"] < 20
    assert sum(pattern["steps"] for pattern in result["patterns"]) == result["steps"]


def test_a_cached_trial_costs_what_is_left_to_do(tmp_path):
    plain, cached = (trial(tmp_path, "static", layers=3, cache=on) for on in (False, True))
    assert plain["cache"] is None
    # Ten samples of each of 10 batches are kept in the first epoch; in the second all of them are known.
    looked = cached["cache"].pop("looked")
    assert cached["cache"] == {"hits": 100, "misses": 100, "bytes": 100 * (64 + 1) * 4, "cut": "3", "reason": ""}
    unit = 10 * 2 * 64 * 64
    assert plain["flops"] == 20 * 11 * unit
    # Three forward products less, and whole forward passes on the samples with which the cache looked where to cut.
    assert 3 * 10 <= looked < 8 * 10
    assert cached["flops"] == (10 * 11 + 10 * 8) * unit + 6 * looked * unit // 10
    assert cached["accuracy"] == pytest.approx(plain["accuracy"], abs=0.005)


@pytest.mark.parametrize(("policy", "options"), [("egeria", {"bootstrap": 0.0}), ("simfreeze", {})])
def test_a_policys_own_passes_cost_what_they_are(tmp_path, policy, options):
    plain, watched = trial(tmp_path), trial(tmp_path, policy, tolerance=1e-9, **options)
    assert watched["freezes"] == []
    # Of twenty steps: at most twenty checks, each by one or two passes of ten samples through one layer to five.
    unit, more = 10 * 2 * 64 * 64, watched["flops"] - plain["flops"]
    assert more % unit == 0
    assert more // unit == {"egeria": 2 * 19, "simfreeze": 5 * 20}[policy]


def test_a_cache_that_skips_nothing_costs_nothing_less(tmp_path):
    result = trial(tmp_path, "none", cache=True)
    nothing = {"hits": 0, "misses": 200, "looked": 0, "bytes": 0, "cut": ""}
    assert result["cache"] == {**nothing, "reason": "nothing is frozen yet"}
    assert result["flops"] == trial(tmp_path)["flops"]


def test_several_batches_a_step_and_a_front_that_grows(tmp_path):
    result = trial(tmp_path, "linear", recipe={"epochs": 4, "accumulate": 2}, start=0.1, cache=True)
    assert result["steps"] == 20
    assert result["cache"]["hits"] + result["cache"]["misses"] == 400
    assert 0 < result["cache"]["hits"] < 400
    whole = sum(pattern["step_flops"] * pattern["steps"] for pattern in result["patterns"])
    looked = result["cache"]["looked"] * 6 * 2 * 64 * 64
    assert looked > 0
    assert 0.5 * whole < result["flops"] - looked < whole


def test_adapters_in_place_of_layers(tmp_path):
    result = trial(tmp_path, lora=4)
    assert result["status"] == "finished"
    assert (result["layers"], result["freezes"], result["cache"]) == ([], [], None)
    assert result["curve"][-1]["train_loss"] < result["curve"][0]["train_loss"]
    assert result["flops"] == 20 * 10 * 2 * 64 * (12 * 64 + 29 * 4)  # counted in test_cost.py


# Multiplications and additions on a sample: two convolutions of 3x3 that make 8 channels of 64 pixels, and the head.
CONVOLUTION, DEPTHWISE_FORWARD = 2 * 9 * 8 * 64, 2 * (2 * 9 * 8 * 64 + 10 * 8 * 64)


def test_a_probed_head_costs_its_passes_and_its_fit(tmp_path):
    plain, probed = (trial(tmp_path, workload=DEPTHWISE, recipe={"lr": 1e-3}, probe=on) for on in (False, True))
    assert plain["probe"] is None
    found = probed["probe"]
    assert (found["probed"], found["head"], found["samples"], found["passed"]) == (True, "3", 100, 110)
    assert probed["flops"] == plain["flops"] + 110 * DEPTHWISE_FORWARD + found["fit_flops"]
    assert probed["accuracy"] > plain["accuracy"]


def test_the_pass_of_a_probe_fills_the_cache(tmp_path):
    head, cached = (
        trial(tmp_path, "static", layers=1, workload=DEPTHWISE, probe=True, cache=cache) for cache in (False, True)
    )
    assert cached["probe"]["probed"]
    assert (cached["cache"]["hits"], cached["cache"]["misses"]) == (100, 0)
    assert cached["accuracy"] == head["accuracy"]
    looked = cached["cache"]["looked"] * DEPTHWISE_FORWARD
    assert cached["flops"] == head["flops"] - 100 * CONVOLUTION + looked


def test_a_probed_trial_may_abstain(tmp_path):
    plain, probed = (trial(tmp_path, recipe={"train_samples": 30}, probe=on) for on in (False, True))
    assert not probed["probe"]["probed"]
    assert scores(probed["curve"]) == scores(plain["curve"])


def test_a_sieved_trial_takes_fewer_steps(tmp_path):
    plain, sieved = (trial(tmp_path, sieve=share) for share in (0.0, 0.2))
    assert (plain["sieve"], plain["sparse"]) == (None, None)
    assert sieved["sieve"] == {"left_out": 20, "exchanges": 1}
    assert (sieved["steps"], sieved["planned_steps"], sieved["status"]) == (16, 16, "finished")
    assert sieved["flops"] == 0.8 * plain["flops"]


def test_a_trial_with_infobatch_costs_the_steps_that_were_expected_of_it(tmp_path):
    recipe = {"epochs": 4}
    plain, pruned = (trial(tmp_path, "static", recipe=recipe, layers=2, infobatch=share) for share in (0.0, 0.5))
    # One epoch of four at the start and half of one at the end are whole; the rest is expected to be .65 of one.
    assert plain["infobatch"] is None
    assert (plain["steps"], pruned["steps"], pruned["planned_steps"]) == (40, 31, 31)
    assert pruned["flops"] == plain["flops"] * 31 // 40
    assert pruned["infobatch"]["share"] == 0.5
    assert 0 < pruned["infobatch"]["left_out"] < pruned["infobatch"]["below_mean"] < 1
    stopped = trial(tmp_path, "stopped", recipe=recipe, budget=0.5, infobatch=0.5)
    assert (stopped["steps"], stopped["planned_steps"]) == (16, 31)


# Of 17 products in a full step of six layers, the last of which is dense, at a density of 1/4: forward 5 * 1/4 + 1,
# for weights as many, for inputs 4 * 1/4 + 1. Of 13 with two layers frozen: 2.25, 3 * 1/4 + 1 and 2 * 1/4 + 1.
@pytest.mark.parametrize(("layers", "products", "left"), [(0, 17, 6.5), (2, 13, 5.5)])
def test_a_sparse_trial_counts_what_was_executed_and_says_what_could_be_left(tmp_path, layers, products, left):
    result = trial(tmp_path, "static", layers=layers, sparse=0.75)
    assert result["flops"] == 20 * products * 10 * 2 * 64 * 64
    share = pytest.approx(left / products)
    assert result["sparse"] == {"sparsity": 5 * 0.75 / 6, "changes": 1, "theoretical_flops_share": share}


def test_a_sparse_training_that_is_lost_is_recorded_as_such(tmp_path):
    result = trial(tmp_path, recipe={"lr": 1e30}, sparse=0.75)
    assert (result["status"], result["sparse"]["sparsity"]) == ("diverged", 0.625)


def test_freezing_sieve_masks_and_cache_together(tmp_path):
    result = trial(tmp_path, "spfde", target=0.8, recipe={"epochs": 5}, sieve=0.2, sparse=0.75, cache=True)
    assert result["status"] == "finished"
    assert 10 * result["steps"] == result["cache"]["hits"] + result["cache"]["misses"] == 400
    assert result["freezes"]
    looked = result["cache"]["looked"] * 6 * 2 * 64 * 64
    assert result["flops"] - looked <= 0.8 * 0.8 * trial(tmp_path, recipe={"epochs": 5})["flops"]
    assert result["sieve"] == {"left_out": 20, "exchanges": 4}
    assert 0 < result["sparse"]["theoretical_flops_share"] < 0.5


class LastAlone(FreezePolicy):
    """Freezes the last layer that can freeze."""

    def decide(self, view):
        return frozenset({len(view.layers) - 1})


def test_a_policy_that_nobody_has_heard_of(tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, "made-up", LastAlone)
    assert trial(tmp_path, "made-up")["patterns"][0]["frozen"] == [4]


def test_the_log_says_what_a_freeze_saves(tmp_path, capsys):
    trial(tmp_path, "static", layers=3)
    assert "65% of a full step's FLOPs" in capsys.readouterr().out  # 11 of 17 products


def test_a_frozen_training_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    def run(stop_at, name):
        freezing = FreezeHook(make_policy("linear", start=0.1))
        hooks = (freezing, toys.StopAt(stop_at))
        training = train(toys.six_linear(), seed=2, device="cpu", hooks=hooks, checkpoint=tmp_path / name)
        return training, freezing.controller

    whole, unbroken = run(10_000, "whole")
    run(13, "broken")
    resumed, controller = run(10_000, "broken")
    assert resumed.status == "finished"
    assert controller.history == unbroken.history
    assert scores(resumed.curve) == scores(whole.curve)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_build_workload_changes_source_and_recipe():
    workload = build_workload("mlp-digits", "fashion", {"epochs": 2.0})
    assert (workload.source, workload.recipe.epochs) == ("fashion", 2.0)
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        build_workload("mlp-digits", None, {"epoch": 2})
    with pytest.raises(UsageError, match="epochs"):
        build_workload("mlp-digits", None, {"epochs": "many"})
