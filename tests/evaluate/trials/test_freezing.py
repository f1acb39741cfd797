"""Training with the frozen prefix's features kept: the same numbers as without, and counts that add up."""

import pytest
import torch

from collect.training.loop import train
from collect.workloads import load_workload
from evaluate.trials.freezing import UNDER_AUGMENTATION, CacheHook, FreezeHook
from predictor.cache import levels
from predictor.errors import UsageError
from predictor.policies import make_policy
from tests.evaluate import toys


def run(workload, policy, cached=True, stop_at=None, checkpoint=None, form="exact", kept=None, **options):
    freezing = FreezeHook(make_policy(policy, **options))
    caching = CacheHook(freezing, form, **(kept or {}))
    hooks = (freezing, caching, toys.StopAt(stop_at)) if cached else (freezing, toys.StopAt(stop_at))
    return train(workload, seed=3, device="cpu", hooks=hooks, checkpoint=checkpoint), caching


def small_resnet(**recipe):
    settings = {"epochs": 6, "batch_size": 20, "train_samples": 120, **recipe}
    return load_workload("resnet8-digits").with_recipe(**settings)


@pytest.mark.parametrize(("policy", "options"), [("static", {"share": 0.5}), ("linear", {"start": 0, "level": 0.3})])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cached_training_ends_where_one_without_ends(policy, options, accumulate):
    """Shuffled samples, BatchNorm behind the prefix. Kept features may be rounded otherwise than fresh ones, by 1e-6;
    a few steps make at most 1e-4 of that.
    """
    workload = small_resnet(accumulate=accumulate)
    plain, _ = run(workload, policy, cached=False, **options)
    cached, caching = run(workload, policy, **options)
    assert caching.hits.total() > 0
    assert caching.cache.reason == ""
    assert caching.hits.total() + caching.misses == 20 * cached.step * accumulate == 20 * 36
    for ours, theirs in zip(cached.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [row["test_accuracy"] for row in cached.curve] == [row["test_accuracy"] for row in plain.curve]
    losses = [[row["train_loss"] for row in training.curve] for training in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_front_that_grows_begins_from_its_old_features_at_first():
    _, caching = run(toys.six_linear().with_recipe(epochs=12), "linear", start=0.0)
    assert all(under <= frozen for frozen, under in caching.hits)
    assert any(under < frozen for frozen, under in caching.hits)
    assert any(under == frozen for frozen, under in caching.hits)


def test_a_step_that_was_not_taken_is_not_counted():
    training, caching = run(toys.six_linear().with_recipe(lr=1e30), "static", layers=1)
    assert training.status == "diverged"
    assert caching.hits.total() + caching.misses == 10 * training.step < 10 * 20


def test_a_cached_training_goes_on_from_its_checkpoint(tmp_path):
    whole, unbroken = run(toys.six_linear(), "static", layers=2)
    run(toys.six_linear(), "static", layers=2, stop_at=13, checkpoint=tmp_path / "broken")
    resumed, caching = run(toys.six_linear(), "static", layers=2, checkpoint=tmp_path / "broken")
    assert resumed.status == "finished"
    counts = {"hits": 100, "misses": 100, "looked": unbroken.looked}
    assert unbroken.figures | {"bytes": 0} == {**counts, "bytes": 0, "cut": "2", "reason": ""}
    # 10 batches missed and 3 hit before; the features were lost, and in the 7 that are left no sample comes again.
    assert (caching.hits.total(), caching.misses) == (30, 170)
    assert caching.looked == 2 * unbroken.looked > 0  # for a place to cut, once more
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


GROWING = {"fronts": [[0.0, 0.25], [0.39, 0.6]]}  # from step 12 of 30 on
FORMS = [
    ("compressed", {}, "static", {"share": 0.5}, 15),
    ("compressed", {}, "schedule", GROWING, 12),  # just after the growth
    ("views", {"views": 2}, "static", {"share": 0.5}, 9),  # while views are gathered
    ("views", {"views": 2}, "static", {"share": 0.5}, 21),
    ("views", {"views": 2}, "schedule", GROWING, 12),
    ("views", {"views": 2}, "schedule", GROWING, 16),  # while the new prefix is filled from the old one
]


@pytest.mark.parametrize(("form", "kept", "policy", "options", "stop_at"), FORMS)
def test_a_training_of_each_form_goes_on_from_its_checkpoint_bit_for_bit(
    form, kept, policy, options, stop_at, tmp_path, monkeypatch
):
    monkeypatch.setattr(levels, "look_passes", lambda batch: 0.0)  # no new cut pays in so short a training
    workload = small_resnet(epochs=5, batch_size=10, train_samples=60, augment=form != "compressed")
    settings = {"form": form, "kept": kept, **options}
    whole, unbroken = run(workload, policy, **settings)
    run(workload, policy, stop_at=stop_at, checkpoint=tmp_path / "broken", **settings)
    resumed, caching = run(workload, policy, checkpoint=tmp_path / "broken", **settings)
    assert (whole.status, resumed.status) == ("finished", "finished")
    assert unbroken.hits.total() > 0
    assert unbroken.hits.total() + unbroken.misses == 10 * whole.step == 10 * 30
    if policy == "schedule":  # passes from the features at the old cut, and at both
        assert any(under < frozen for frozen, under in unbroken.hits)
        assert len({under for _, under in unbroken.hits}) == 2
    assert caching.figures == unbroken.figures
    assert (caching.figures["form"], caching.figures["reason"]) == (form, "")
    assert all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values()))
    assert [row["test_loss"] for row in resumed.curve] == [row["test_loss"] for row in whole.curve]


@pytest.mark.parametrize(
    ("form", "layers", "row_bytes", "precision"),
    [
        ("exact", 3, 64 * 4 + 4, None),
        ("compressed", 1, 64 * 4 + 4, "full"),  # 1 of 5 layers; a row holds 64 features and a fingerprint
        ("compressed", 2, 64 * 2 + 4, "half"),
        ("compressed", 3, 64 + 4 + 4, "int8"),  # and a scale
        ("views", 2, 64 * 2 + 4 + 2 * 16 * 2, "half"),  # and a quarter of the features of two more views
        ("views", 3, 64 + 4 + 4 + 2 * (16 + 4), "int8"),
        ("first", 3, 64 * 4 + 4, "full"),
    ],
)
def test_storage_figures_by_hand(form, layers, row_bytes, precision):
    workload = toys.six_linear().with_recipe(epochs=4, augment=form in UNDER_AUGMENTATION)
    _, caching = run(workload, "static", form=form, layers=layers)
    passes = 3 if form == "views" else 1
    assert (caching.misses, caching.hits.total()) == (100 * passes, 100 * (4 - passes))
    assert caching.figures["bytes"] == 100 * row_bytes
    if form != "exact":
        assert (caching.figures["precision"], caching.figures["exact_bytes"]) == (precision, 100 * (64 * 4 + 4))


def test_forms_that_want_the_same_samples_refuse_augmented_ones():
    for form in ("exact", "compressed"):
        with pytest.raises(UsageError, match="random augmentation"):
            run(toys.six_linear().with_recipe(augment=True), "static", form=form, layers=2)


@pytest.mark.parametrize("form", ["veiws", "direct"])
def test_a_form_that_does_not_exist_is_refused(form):
    with pytest.raises(UsageError, match=rf"'{form}'.*views"):
        CacheHook(FreezeHook(make_policy("none")), form)


def test_adapters_have_no_layers_to_freeze():
    freezing = FreezeHook(make_policy("none"), layers=())
    train(toys.six_linear(), seed=0, device="cpu", hooks=(freezing,))
    assert freezing.controller.layers == ()
    assert freezing.controller.history == []
