"""A predictor's file: what travels with it, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.model.file import PredictorFile, load_predictor, save_predictor
from predictor.model.network import FreezePredictor
from predictor.model.sampling import SampleSpec
from predictor.policies.smartfrz import SHIPPED

SMALL = PredictorConfig(window=4, weights=8, hidden=8, key=4)


def make():
    torch.manual_seed(0)
    return FreezePredictor(SMALL).eval()


def test_the_scaling_keeps_the_names_that_it_has_in_files_of_earlier_versions(tmp_path):
    save_predictor(tmp_path / "again.safetensors", load_predictor(SHIPPED))
    with safe_open(SHIPPED, "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as other:
        assert {"mean", "deviation"} < set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    assert (load_predictor(SHIPPED).model.scaling.deviation != 1).any()


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


def saved(path, **changes):
    save_predictor(path, PredictorFile(make(), SampleSpec(weights=8), 0.7, {"figures": {"auroc": 0.9}}))
    if changes:
        tensors = {name.removeprefix("scaling."): tensor.clone() for name, tensor in make().state_dict().items()}
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
    tokens = torch.randn(16, 3, SMALL.width)
    assert torch.equal(file.model(tokens), make()(tokens))
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
    "a threshold beyond floats": {"threshold": 10**400},
    "a prefix model that is none": {"prefix": {"weights": []}},
    "a prefix model with a feature that does not exist": {
        "prefix": {"intercept": 0.0, "weights": {"size": 1.0}, "allowances": []}
    },
    "a prefix model beyond floats": {"prefix": {"intercept": 10**400, "weights": {}, "allowances": []}},
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
    "a tensor by its name in the network": {"tensors": {"scaling.mean": torch.zeros(15)}},
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
