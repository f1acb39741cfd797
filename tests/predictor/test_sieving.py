"""A sampler that leaves the easiest samples out: epochs of a real DataLoader, and going on from a state."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from predictor import SieveSampler
from predictor.errors import UsageError

SIZE = 20


class Numbers(Dataset):
    """Each sample is its index."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return index


def epoch(sampler, right=lambda ids: ids < 10, workers=0):
    """The ids of an epoch, in which the samples in `right` are answered right."""
    seen = []
    for ids in DataLoader(Numbers(), batch_size=4, sampler=sampler, num_workers=workers):
        sampler.note(ids, right(ids))
        seen += ids.tolist()
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_once_through_those_that_are_in_and_the_easiest_go_out(workers):
    sampler = SieveSampler(SIZE, left_out=0.4)
    first = epoch(sampler, workers=workers)
    assert len(first) == len(set(first)) == len(sampler) == 12
    out = set(range(SIZE)) - set(first)
    second = epoch(sampler, workers=workers)
    came, went = set(second) - set(first), set(first) - set(second)
    assert len(came) == len(went) == 4  # half of the eight that waited
    assert came <= out
    assert max(went) < 10  # at least two of the twelve are wrong, and stay


def test_forgetting_keeps_a_sample_in():
    sampler = SieveSampler(SIZE, left_out=0.1, every=2, moved=1.0)
    first = epoch(sampler, right=lambda ids: ids >= 0)
    wrong_once = set(first[:4])
    second = epoch(sampler, right=lambda ids: torch.tensor([index not in wrong_once for index in ids.tolist()]))
    assert set(second) == set(first)  # an interval is two epochs
    sampler.note(torch.tensor(sorted(wrong_once)), torch.ones(4, dtype=torch.bool))  # learnt again
    assert wrong_once <= set(epoch(sampler))


def test_the_order_differs_by_epoch_and_is_the_seeds():
    same, again, other = SieveSampler(SIZE), SieveSampler(SIZE), SieveSampler(SIZE, seed=1)
    first = epoch(same)
    assert first == epoch(again) != epoch(other)
    assert first != epoch(same)


def test_it_goes_on_from_a_state():
    whole, broken = SieveSampler(SIZE, left_out=0.3), SieveSampler(SIZE, left_out=0.3)
    for sampler in (whole, broken):
        for _ in range(2):
            epoch(sampler)
    state = broken.state_dict()
    epoch(broken, right=lambda ids: ids >= 10)  # what goes on changes nothing of what was saved
    resumed = SieveSampler(SIZE, left_out=0.3)
    resumed.load_state_dict(state)
    for _ in range(3):
        assert epoch(resumed) == epoch(whole)
    with pytest.raises(UsageError, match="the state is of 20 samples, and there are 30 here"):
        SieveSampler(30).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": 0.0}, "left_out=0.0 of size=20"),
        ({"left_out": 1.0}, "left_out=1.0 of size=20"),
        ({"left_out": 0.01}, "left_out=0.01 of size=20"),
        ({"every": 0}, "every=0: give the epochs"),
        ({"moved": 0.0}, "moved=0.0: give a share"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SieveSampler(SIZE, **options)
