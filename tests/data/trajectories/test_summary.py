"""The summary: figures worked out by hand."""

import numpy as np
import pytest

from data.trajectories import LabelRule, write_runs
from data.trajectories.schema import WRITTEN
from data.trajectories.summary import describe
from predictor.errors import FileFault
from tests.data.made import made_trajectory, write_changed


def outcome(accuracy, status="finished"):
    return {
        "status": status,
        "final_accuracy": accuracy,
        "final_loss": 0.5,
        "train_seconds": 1.0,
        "cpu_seconds": 1.0,
    }


@pytest.fixture
def path(tmp_path):
    other = made_trajectory("z")
    other.config.update(workload="evil\x1b[2J", source="s" * 100)
    runs = [
        made_trajectory("a", outcome=outcome(0.81)),
        made_trajectory("b", outcome=outcome(0.9), provenance={"versions": {"torch": "2.13"}, "note": "\ud800"}),
        made_trajectory("c", outcome=outcome(None, "diverged")),
        other,
    ]
    write_runs(tmp_path / "t.h5", runs)
    return tmp_path / "t.h5"


def test_the_summary_says_what_is_there(path):
    text = describe([path], LabelRule())
    lines = text.splitlines()
    assert lines[0].startswith(f"{path}: 4 runs, 0.0 MB, format version 2")
    row = next(line.split() for line in lines if line.startswith("mlp "))
    # Similarity is 1 from snapshot 0, 1, 2 of 5 on in the layers: 12 of 15, in each of the two runs that finished.
    assert row == ["mlp", "mlp", "digits", "3", "1", "3", "5", "0.810", "to", "0.900", "80.0", "%"]
    assert "CKA to the final network at least 0.98 from there to the end): 80.0 % of 45 snapshots" in text
    assert "sampled: 4 weights a layer, 4 snapshots, seed 0" in lines
    assert "versions torch: 2.14.1 (3 runs), 2.13 (1 runs)" in lines
    assert "hardware device: cpu" in lines
    assert text.endswith("\n")
    for field in WRITTEN:
        assert any(line.startswith(field.name) for line in lines)


def test_the_rule_changes_the_balance(path, tmp_path):
    values = np.tile(np.array([[0.5], [0.9], [0.8], [0.95], [np.nan]], dtype=np.float32), (1, 3))
    write_runs(tmp_path / "u.h5", [made_trajectory(similarity_TL=values)])
    assert "0.0 % of 12" in describe([tmp_path / "u.h5"], LabelRule())
    assert "75.0 % of 12" in describe([tmp_path / "u.h5"], LabelRule(threshold=0.8))
    assert "never more than 0.1 below it): 50.0 % of 12" in describe([tmp_path / "u.h5"], LabelRule(0.9, dip=0.1))


def test_text_out_of_a_file_cannot_reach_the_terminal(path):
    text = describe([path], LabelRule())
    assert "\x1b" not in text
    assert "\ud800" not in text
    assert "evil?[2J" in text
    assert "s" * 61 not in text


def test_facts_that_differ_from_run_to_run_are_counted(tmp_path):
    runs = [made_trajectory(f"r{hour}", provenance={"made": f"{hour}:00", "list": [1]}) for hour in range(1, 7)]
    write_runs(tmp_path / "t.h5", runs)
    assert "made: 6 different values, from 1:00 to 6:00" in describe([tmp_path / "t.h5"], LabelRule()).splitlines()


def test_several_files_and_folders_count_together(path, tmp_path):
    write_runs(tmp_path / "folder" / "runs" / "q.h5", [made_trajectory("q")])
    assert describe([path, tmp_path / "folder"], LabelRule()).startswith("2 files: 5 runs")


def test_an_unsound_run_is_refused(tmp_path):
    with pytest.raises(FileFault, match="run mlp-1: field lr: missing"):
        describe([write_changed(tmp_path / "t.h5", lambda run: run.pop("lr"))], LabelRule())
