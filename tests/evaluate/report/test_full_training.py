"""The figure of full training's curve: which points lie on it, and where the policies are, by hand."""

import re

import pytest

from evaluate.analysis.compute_multiplier import compute_multipliers
from evaluate.report.full_training import Spot, curve_plane, full_training_plot
from evaluate.trials.records import read_results

CELLS = {"none": (0.90, 1000), "shorter 0.7": (0.88, 700), "stopped 0.8": (0.87, 800), "fast": (0.89, 500)}


@pytest.fixture
def results(write, trial):
    """Two workloads; on the second all accuracies are higher and all costs three times as large."""
    return read_results(
        write(
            [
                trial(name, label, seed, accuracy=accuracy + better, flops=flops * more)
                for name, better, more in (("a", 0.0, 1), ("b", 0.05, 3))
                for label, (accuracy, flops) in CELLS.items()
                for seed in (0, 1)
            ]
        )
    )


@pytest.mark.parametrize("workload", ["a", "b", None])
def test_points_are_relative_to_full_training(results, workload):
    plane = curve_plane(results, workload)
    assert plane is not None
    assert [spot.label for spot in plane.curve] == ["shorter 0.7", "none"]
    assert [spot.label for spot in plane.beaten] == ["stopped 0.8"]
    assert plane.policies == (Spot("fast", pytest.approx(50), pytest.approx(-1)),)


def test_every_length_is_named_and_a_policy_has_its_multiplier(results):
    figure = full_training_plot(results, compute_multipliers(results), "a")
    assert figure is not None
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)
    assert {"none", "shorter 0.7", "stopped 0.8", "fast 1.70x"} <= set(texts)  # 85 % of the FLOPs for .89, over 50 %
    assert "1 of 1" in figure.title


def test_without_a_second_length_there_is_no_figure(write, trial):
    results = read_results(write([trial("a", label, 0) for label in ("none", "fast")]))
    assert full_training_plot(results, compute_multipliers(results), "a") is None
    assert full_training_plot(results, compute_multipliers(results), None) is None


def test_a_policy_that_learned_nothing_does_not_squeeze_the_others(write, trial):
    cells = CELLS | {"broken": (0.10, 600)}
    rows = [
        trial("a", name, seed, accuracy=acc, flops=flops) for name, (acc, flops) in cells.items() for seed in (0, 1)
    ]
    results = read_results(write(rows))
    figure = full_training_plot(results, compute_multipliers(results), "a")
    assert figure is not None
    assert "Hollow" in figure.note
    assert not [
        text for text in re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg) if text.startswith("\N{MINUS SIGN}8")
    ]
