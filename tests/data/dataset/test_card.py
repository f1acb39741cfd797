"""The data card: counts, balances and areas worked out by hand."""

import numpy as np
import pytest

from data.dataset.card import data_card
from data.trajectories import LabelRule, write_runs
from predictor.errors import FileFault
from predictor.training.splits import HeldOut
from tests.data.made import made_trajectory, write_changed


def run_of(run_id, family="mlp", source="digits", **changes):
    run = made_trajectory(run_id, **changes)
    run.config.update(family=family, source=source)
    return run


@pytest.fixture
def path(tmp_path):
    """Five snapshots at progress 0, .25, .5, .75, 1 of three layers, which are alike from snapshot 0, 1, 2 on."""
    # The similarity falls again, so that the last of the layers may never be frozen.
    falling_TL = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=np.float32)
    runs = [
        run_of("a"),
        run_of("b", "vit", "glosses"),
        run_of("c", "mlp", "fashion-first"),
        run_of("d", "resnet", similarity_TL=falling_TL),
        run_of("e", outcome={"status": "diverged"}, similarity_TL=np.full((5, 3), np.nan, np.float32)),
    ]
    write_runs(tmp_path / "t.h5", runs)
    return tmp_path / "t.h5"


def rows(text, title):
    """The table whose first line begins so, without its head."""
    (part,) = (part for part in text.split("\n\n") if any(line.startswith(title) for line in part.splitlines()[:2]))
    lines = part.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(title))
    return [line.split() for line in lines[first + 1 :]]


def test_counts_and_balances_by_hand(path):
    text = data_card([path], window=2)
    assert text.startswith(f"{path}: finished runs, in windows of 2 snapshots of a layer\n")
    assert "at least 0.98 from there to the end\nheld out: families resnet, mobilenet" in text
    # Windows end at snapshots 1 to 4: of twelve in a run, one is not yet freezable in runs a, b and c.
    learning, held = ["2", "6", "24", "91.7", "%"], ["2", "6", "24", "79.2", "%"]
    assert rows(text, "part") == [["learning", *learning], ["held-out", *held]]
    one = ["1", "3", "12", "91.7", "%"]
    falling = ["1", "3", "12", "66.7", "%"]
    assert rows(text, "family") == [
        ["mlp", "learning", *one],
        ["vit", "learning", *one],
        ["mlp", "held-out", *one],
        ["resnet", "held-out", *falling],
    ]
    assert [row[:2] for row in rows(text, "source")] == [
        ["digits", "learning"],
        ["glosses", "learning"],
        ["digits", "held-out"],
        ["fashion-first", "held-out"],
    ]
    tenths = {row[0]: row[4:] for row in rows(text, "training done")}
    assert len(tenths) == 10
    assert tenths["20"] == ["6", "66.7", "%", "6", "66.7", "%"]
    assert tenths["50"] == ["6", "100.0", "%", "6", "83.3", "%"]
    assert tenths["90"] == ["6", "100.0", "%", "6", "83.3", "%"]
    assert tenths["0"] == tenths["10"] == ["0", "n/a", "0", "n/a"]


def test_the_auroc_of_one_feature_alone(path):
    text = data_card([path], window=2)
    areas = {" ".join(row[:-2]): [float(part) for part in row[-2:]] for row in rows(text, "AUROC of one feature alone")}
    # To train on: 2 windows are not yet freezable, of progress .25 and depth 1; of the other 22, 4 are as early and
    # 18 later; 6 are as deep, 16 less deep.
    assert areas["progress"][0] == pytest.approx((18 + 4 / 2) / 22, abs=6e-4)
    assert areas["depth"][0] == pytest.approx((6 / 2) / 22, abs=6e-4)
    assert areas["log learning rate"][0] == pytest.approx(1 - (18 + 4 / 2) / 22, abs=6e-4)
    # Held out: run d's deepest layer is never freezable, and run c's at .25 not yet. 19 are; of these 4 are at .25.
    pairs = [(0.25, 2, 4), (0.5, 1, 5), (0.75, 1, 5), (1.0, 1, 5)]
    wins = sum(no * (yes / 2 + sum(more for later, _, more in pairs if later > at)) for at, no, yes in pairs)
    assert areas["progress"][1] == pytest.approx(wins / (5 * 19), abs=6e-4)


def test_the_rule_and_the_split_are_the_callers(path):
    text = data_card([path], LabelRule(threshold=0.9, dip=0.1), HeldOut(), window=3)
    assert "held out: nothing\n" in text
    assert "at least 0.9 from there to the end, dips of 0.1 allowed" in text
    assert rows(text, "part")[1] == ["held-out", "0", "0", "0", "n/a"]
    assert rows(text, "part")[0][1:4] == ["4", "12", "36"]
    assert all(row[-1] == "n/a" for row in rows(text, "AUROC of one feature alone"))


def test_a_file_of_held_out_runs_alone_has_a_card(tmp_path):
    write_runs(tmp_path / "t.h5", [run_of("a", "bert\x1b[2J", "fashion")])
    text = data_card([tmp_path / "t.h5"], window=2)
    assert rows(text, "part") == [["learning", "0", "0", "0", "n/a"], ["held-out", "1", "3", "12", "91.7", "%"]]
    assert "\x1b" not in text


def test_an_unsound_run_is_refused(tmp_path):
    with pytest.raises(FileFault, match="run mlp-1: field lr: missing"):
        data_card([write_changed(tmp_path / "t.h5", lambda run: run.pop("lr"))], window=2)
