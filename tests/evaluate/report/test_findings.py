"""What a suite found, in sentences: each verdict and each side of 1 leads to its own advice."""

import pytest

from evaluate.analysis.compute_multiplier import Multiplier
from evaluate.analysis.statistics import AS_ACCURATE, CANNOT_TELL, LESS_ACCURATE, Estimate, compare
from evaluate.report.findings import MOST_POLICIES, _best, findings, sentence
from evaluate.trials.records import read_results


def row_with(results, verdict):
    row = next(row for row in compare(results) if row.difference is not None)
    return type(row)(**{**vars(row), "verdict": verdict})


def multiplier(low, high, **bounds):
    return Multiplier(Estimate((low + high) / 2, low, high, 3), **bounds)


@pytest.mark.parametrize(
    ("verdict", "factor", "advice"),
    [
        (AS_ACCURATE, multiplier(1.1, 1.3), "use it here"),
        (AS_ACCURATE, multiplier(0.9, 1.3), "not shown to beat fewer steps"),
        (AS_ACCURATE, multiplier(0.7, 0.9), "train for fewer steps instead"),
        (LESS_ACCURATE, multiplier(1.1, 1.3), "worth it where that accuracy is enough"),
        (LESS_ACCURATE, multiplier(0.9, 1.3), "not worth it here"),
        (LESS_ACCURATE, multiplier(1.5, 2.0, below=("a",)), "do not use it here"),
        (CANNOT_TELL, multiplier(0.9, 1.3), "more seeds would tell"),
        (CANNOT_TELL, None, "was not measured"),
    ],
)
def test_what_follows(folder, verdict, factor, advice):
    results = read_results(folder)
    assert advice in sentence(row_with(results, verdict), factor, results)


def test_each_workload_has_a_sentence_for_each_policy_that_freezes(folder):
    results = read_results(folder)
    found = findings(results)
    assert [workload for workload, _ in found] == list(results.workloads)
    assert all(0 < len(sentences) <= MOST_POLICIES for _, sentences in found)


def test_a_multiplier_that_is_at_most_so_large_does_not_lead(folder):
    row = row_with(read_results(folder), LESS_ACCURATE)
    outside = type(row)(**{**vars(row), "policy": "outside"})
    inside = multiplier(1.1, 1.3, by_workload=(("a", 1.2),))
    known = [(row, inside), (outside, multiplier(1.5, 2.0, below=("a",), by_workload=(("a", 1.7),)))]
    assert f": {row.policy}," in _best(known, "the largest")
    assert ": outside," in _best(known[1:], "the largest")
