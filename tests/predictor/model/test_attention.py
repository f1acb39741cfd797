"""The freeze predictor and its file."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from predictor.errors import FileFault, UsageError
from predictor.model.features import SIGNALS
from predictor.model.file import PredictorFile, load_predictor, save_predictor
from predictor.model.network import FreezePredictor, PredictorConfig, motion_BTF
from predictor.model.sampling import SampleSpec

SMALL = PredictorConfig(window=4, weights=8, hidden=8, key=4)


def make(config=SMALL):
    torch.manual_seed(0)
    return FreezePredictor(config).eval()


def batch(size=64, window=4, weights=8):
    torch.manual_seed(1)
    return torch.randn(size, window, weights).cumsum(dim=1), torch.rand(size, window, len(SIGNALS))


def test_motion_by_hand():
    # Two weights: (0, 0) -> (3, 4) -> (3, 1). RMS of the newest is sqrt(5).
    motion = motion_BTF(torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 1.0]]]))[0]
    first, second = math.sqrt(12.5) / math.sqrt(5), math.sqrt(4.5) / math.sqrt(5)
    assert motion[0].tolist() == pytest.approx(
        [math.log(first), 0, math.log(first), 1, 0, 3.5 / math.sqrt(12.5)], abs=1e-5
    )
    expected = [math.log(second), -0.8, 0.0, 1 / (first + second), math.log(second / first), 1.5 / math.sqrt(4.5)]
    assert motion[1].tolist() == pytest.approx(expected, abs=1e-5)


def test_motion_knows_neither_scale_nor_order_of_the_weights():
    windows, _ = batch(weights=32)
    motion = motion_BTF(windows)
    assert torch.allclose(motion, motion_BTF(windows * 1000), atol=1e-4)
    assert torch.allclose(motion, motion_BTF(windows[..., torch.randperm(32)]), atol=1e-5)


def test_motion_of_standing_and_of_zero_weights_is_finite():
    assert motion_BTF(torch.ones(1, 4, 8)).isfinite().all()
    assert motion_BTF(torch.zeros(1, 4, 8)).isfinite().all()


@pytest.mark.parametrize("inputs", ["gain", "motion", "raw"])
def test_one_window_is_judged_alike_alone_and_among_others(inputs):
    model = make(PredictorConfig(inputs=inputs, window=4, weights=8))
    windows, signals = batch(64)
    together = model(windows, signals)
    alone = torch.cat([model(windows[i : i + 1], signals[i : i + 1]) for i in range(64)])
    assert together.shape == (64,)
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_newest_asks_and_the_older_answer_by_a_plain_reference():
    model = make(PredictorConfig(inputs="raw", window=4, weights=8, hidden=8, key=4))
    windows, signals = batch(3)
    for i in range(3):
        key, query, value = model.networks(windows[i])
        scores = torch.stack([query[3] @ key[t] for t in range(3)]) / math.sqrt(4)
        z = sum(weight * value[t] for t, weight in enumerate(scores.softmax(dim=0)))
        assert torch.allclose(model(windows, signals)[i], model.output(z)[0], atol=1e-5)


def test_of_more_weights_than_configured_some_all_over_are_taken_and_fewer_are_refused():
    model = make()
    windows, signals = batch(weights=12)
    taken = [0, 1, 3, 4, 6, 7, 9, 10]  # place * 12 // 8
    assert torch.equal(model(windows, signals), model(windows[..., taken].clone(), signals))
    with pytest.raises(UsageError, match=r"needs 4 snapshots of at least 8 weights"):
        model(windows[..., :7], signals)
    with pytest.raises(UsageError, match="needs 4 snapshots"):
        model(windows[:, :3], signals[:, :3])
    with pytest.raises(UsageError, match="3 signals: this predictor needs progress, depth"):
        model(windows[..., :8], signals[..., :3])


def test_without_gains_the_clock_is_enough():
    model = make(PredictorConfig(inputs="motion", window=4, weights=8))
    windows, signals = batch()
    assert torch.equal(model(windows, signals), model(windows, signals[..., :3]))


RISKS = ((0.25, 0.9), (0.5, 0.7), (1.0, 0.3))


def test_risks_travel_with_the_file_and_between_them_the_threshold_is_linear(tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(path, PredictorFile(make(), SampleSpec(weights=8), 0.7, {}, RISKS))
    file = load_predictor(path)
    assert file.risks == RISKS
    assert [file.threshold_for(risk) for risk in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    for risk in (0.2, 1.1):
        with pytest.raises(UsageError, match=f"risk={risk}: give percentage points of accuracy from 0.25 to 1"):
            file.threshold_for(risk)


def test_a_predictor_that_knows_what_freezing_costs_weighs(tmp_path):
    assert load_predictor(saved(tmp_path / "p.safetensors", risks=RISKS)).weighs
    assert not load_predictor(saved(tmp_path / "q.safetensors")).weighs


def test_a_file_from_before_thresholds_were_weighed_is_refused(tmp_path):
    with pytest.raises(FileFault, match="of version 2, and this program reads version 3; make one with"):
        load_predictor(saved(tmp_path / "p.safetensors", risks=RISKS, version=2))


def test_without_risks_a_risk_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not know what freezing costs"):
        load_predictor(saved(tmp_path / "p.safetensors")).threshold_for(0.5)


def test_scaling_is_fitted_stored_and_survives_a_constant_token():
    model = make()
    windows, signals = batch()
    signals[..., 1] = 0.5
    model.fit_scaling(model.tokens(windows, signals))
    assert "mean" in model.state_dict()
    assert model.deviation.min() == 0
    assert model(windows, signals).isfinite().all()


@pytest.mark.parametrize(("setting", "value"), [("window", 2), ("weights", 0), ("dropout", 1.0)])
def test_a_form_that_cannot_be_is_refused(setting, value):
    with pytest.raises(UsageError, match=str(value)):
        PredictorConfig(**{setting: value})


def saved(path, **changes):
    save_predictor(path, PredictorFile(make(), SampleSpec(weights=8), 0.7, {"figures": {"auroc": 0.9}}))
    if changes:
        tensors = {name: tensor.clone() for name, tensor in make().state_dict().items()}
        meta = {
            "format": "smartfrz-predictor",
            "version": 3,
            "config": {"inputs": "gain", "window": 4, "weights": 8, "hidden": 8, "key": 4, "dropout": 0.1},
            "spec": {"weights": 8, "snapshots": 60, "seed": 0},
            "threshold": 0.7,
            "card": {},
        }
        tensors.update(changes.pop("tensors", {}))
        save_file(tensors, path, {"smartfrz": json.dumps({**meta, **changes})})
    return path


def test_save_and_load_give_the_same_answers(tmp_path):
    file = load_predictor(saved(tmp_path / "p.safetensors"))
    windows, signals = batch()
    assert torch.equal(file.model(windows, signals), make()(windows, signals))
    assert (file.spec, file.threshold, file.card) == (SampleSpec(weights=8), 0.7, {"figures": {"auroc": 0.9}})


def test_any_seed_that_samples_can_be_loaded(tmp_path):
    spec = SampleSpec(weights=8, seed=2**32 - 1)
    save_predictor(tmp_path / "p.safetensors", PredictorFile(make(), spec, 0.7, {}))
    assert load_predictor(tmp_path / "p.safetensors").spec == spec


CONFIG = {"inputs": "gain", "window": 4, "weights": 8, "hidden": 8, "key": 4, "dropout": 0.1}
BAD = {
    "another format": {"format": "something"},
    "another version": {"version": 1},
    "a width beyond reason": {"config": {**CONFIG, "hidden": 10**9}},
    "a width that its tensors do not have": {"config": {**CONFIG, "hidden": 60000}},
    "an unknown field": {"config": {**CONFIG, "code": "import os"}},
    "a missing field": {"config": {"window": 4}},
    "a field of another type": {"config": {**CONFIG, "window": "4"}},
    "a threshold outside": {"threshold": 7},
    "a risk whose threshold lies outside": {"risks": [[0.5, 2.0]]},
    "risks that do not rise": {"risks": [[0.5, 0.5], [0.5, 0.4]]},
    "a risk that is no pair": {"risks": [[0.5]]},
    "a threshold that is none": {"threshold": float("nan")},
    "more weights than its sampling": {"spec": {"weights": 4, "snapshots": 60, "seed": 0}},
    "a seed beyond the generator's": {"spec": {"weights": 8, "snapshots": 60, "seed": 10**400}},
    "a seed below 0": {"spec": {"weights": 8, "snapshots": 60, "seed": -1}},
    "weights that are not numbers": {"tensors": {"output.2.bias": torch.tensor([float("nan")])}},
    "weights of another type": {"tensors": {"output.2.bias": torch.zeros(1, dtype=torch.float64)}},
    "a tensor too many": {"tensors": {"extra": torch.zeros(1)}},
    "a configuration that is a list": {"config": [1, 2]},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_with_its_name_and_the_cure(tmp_path, changes):
    with pytest.raises(FileFault, match=r"bad\.safetensors: .*python -m predictor train"):
        load_predictor(saved(tmp_path / "bad.safetensors", **changes))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FileFault, match=r"bad\.safetensors: it is not a predictor file"):
        load_predictor(tmp_path / "bad.safetensors")


def test_a_missing_file_a_folder_a_cut_and_a_huge_one_are_refused(tmp_path):
    with pytest.raises(FileFault, match="No such file"):
        load_predictor(tmp_path / "none.safetensors")
    with pytest.raises(FileFault):
        load_predictor(tmp_path)
    whole = saved(tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFault, match="cut"):
        load_predictor(tmp_path / "cut.safetensors")
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no disk
    with pytest.raises(FileFault, match="larger than 64 MiB"):
        load_predictor(tmp_path / "huge.safetensors")
