"""The part of a batch: its first samples, wherever they can be told, and else the whole batch."""

from collections import namedtuple

import pytest
import torch

from predictor.layers.batch import part_of

X, Y = torch.randn(32, 3, 4), torch.arange(32)
Named = namedtuple("Named", "x y")


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


IMAGES = [torch.randn(3, 5, size) for size in range(5, 37)]
TARGETS = [{"boxes": torch.randn(size % 4, 4)} for size in range(32)]


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        (X, X[:8]),
        ((X, Y), (X[:8], Y[:8])),
        ([X, Y], [X[:8], Y[:8]]),  # as a DataLoader makes it
        ((Y, Y), (Y[:8], Y[:8])),
        (Named(X, Y), Named(X[:8], Y[:8])),
        (
            {"x": X, "y": Y, "scale": torch.tensor(2.0), "n": 3},
            {"x": X[:8], "y": Y[:8], "scale": torch.tensor(2.0), "n": 3},
        ),
        (({"ids": Y, "mask": Y}, Y), ({"ids": Y[:8], "mask": Y[:8]}, Y[:8])),
        ((X, [str(each) for each in range(32)]), (X[:8], [str(each) for each in range(8)])),
        ((IMAGES, TARGETS), (IMAGES[:8], TARGETS[:8])),
        ((tuple(IMAGES), tuple(TARGETS)), (tuple(IMAGES[:8]), tuple(TARGETS[:8]))),
        ([IMAGES, Y], [IMAGES[:8], Y[:8]]),
        (list(zip(IMAGES, TARGETS, strict=True)), list(zip(IMAGES, TARGETS, strict=True))[:8]),
        ([*X.unbind()], [*X[:8].unbind()]),
        (TARGETS, TARGETS[:8]),
    ],
)
def test_a_quarter_of_the_samples(batch, part):
    found, share = part_of(batch)
    assert share == 0.25
    assert same(found, part)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y[:5]),
        {"x": X, "classes": torch.zeros(3)},
        (X.to_sparse(), Y),
        (torch.nested.as_nested_tensor([*X], layout=torch.jagged), Y),
        [torch.tensor(1.0)],
        (),
        "text",
        object(),
        ([X] * 8, Y),  # several views of each sample
    ],
)
def test_without_a_common_first_dimension_it_stays_whole(batch):
    found, share = part_of(batch)
    assert found is batch
    assert share == 1.0


@pytest.mark.parametrize(("size", "few"), [(3, 3), (4, 4), (5, 4), (16, 4), (18, 5)])
def test_four_samples_at_least(size, few):
    found, share = part_of((X[:size], Y[:size]))
    assert len(found[0]) == few
    assert share == few / size


def test_the_batch_itself_stays_as_it_is():
    batch = {"x": X.clone(), "y": Y}
    part_of(batch)[0].pop("x").zero_()
    assert torch.equal(batch["x"], X)


def test_a_batch_of_transformers():
    made = pytest.importorskip("transformers").BatchEncoding({"input_ids": X, "labels": Y})
    found, share = part_of(made)
    assert type(found) is type(made)
    assert (len(found.input_ids), len(found["labels"]), len(made["labels"]), share) == (8, 8, 32, 0.25)
