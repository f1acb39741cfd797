"""Halves of a source's classes: what they hold, what they keep of the whole, and where there are none."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.sources import SOURCES, load_source
from data.sources.memory import ImageSource, Look, MemorySource, Samples, TokenSource
from predictor.errors import UsageError


def loaded(name: str) -> MemorySource:
    source = load_source(name)
    assert isinstance(source, MemorySource)
    return source


@pytest.mark.parametrize("name", ["digits", "fashion", "glosses"])
def test_half_of_the_classes_with_labels_and_ids_that_count_anew(name: str) -> None:
    whole = loaded(name)
    for half_name, first in ((f"{name}-first", 0), (f"{name}-last", 5)):
        half = loaded(half_name)
        assert (half.name, half.classes, half.shape, half.kind) == (half_name, 5, whole.shape, whole.kind)
        assert (half.augmentable, half.vocabulary) == (whole.augmentable, whole.vocabulary)
        for split in ("train", "test"):
            chosen = [index for index, label in enumerate(whole.labels(split).tolist()) if first <= label < first + 5]
            assert torch.equal(half.labels(split) + first, whole.labels(split)[chosen])
            assert torch.equal(half.samples[split].inputs, whole.samples[split].inputs[chosen])
        ids_B, _, _ = next(half.batches("train", 3, shuffle=False))
        assert ids_B.tolist() == [0, 1, 2]
        assert half.limited(50).labels("train").bincount().tolist() == [10] * 5
    assert (whole.name, whole.classes) == (name, 10)


def test_the_halves_of_an_image_source_are_normalized_as_the_whole() -> None:
    whole, half = loaded("digits"), loaded("digits-last")
    _, all_BCHW, labels_B = next(whole.batches("test", 360, shuffle=False))
    _, x_BCHW, _ = next(half.batches("test", 360, shuffle=False))
    assert torch.equal(x_BCHW, all_BCHW[labels_B >= 5])


def few(classes: int) -> TokenSource:
    samples = Samples(torch.arange(4 * classes).view(-1, 2), torch.arange(2 * classes) % classes)
    return TokenSource("few", classes, samples, samples, tuple("abc"))


def test_of_an_odd_number_of_classes_the_last_half_has_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "few", lambda: few(5))
    assert [loaded(name).classes for name in ("few-first", "few-last")] == [2, 3]
    assert loaded("few-last").labels("test").tolist() == [0, 1, 2, 0, 1, 2]
    monkeypatch.setitem(SOURCES, "few", lambda: few(3))
    with pytest.raises(UsageError, match="few-first: half of the 3 classes of few are too few"):
        load_source("few-first")


@pytest.mark.parametrize("name", ["digits-middle", "digit-first", "-first", "digits-", "digits-first-last"])
def test_what_is_no_half(name: str) -> None:
    with pytest.raises(UsageError, match=f"there is no source '{name}'.*NAME-first and NAME-last"):
        load_source(name)


class Copies(TorchDispatchMode):
    """Notes copies to another device: how many, and those that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.waiting = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            self.all += 1
            self.waiting += not kwargs.get("non_blocking")
        return func(*args, **(kwargs or {}))


def test_a_batch_does_not_wait_for_the_device() -> None:
    """One copy of its ids and one of the random numbers. A split itself is copied once."""
    samples = Samples(torch.zeros(12, 3, 8, 8, dtype=torch.uint8), torch.arange(12) % 2)
    source = ImageSource("small", 2, samples, samples, Look((0.0,) * 3, (1.0,) * 3, shift=1, flip=True))
    batches = source.batches("train", 4, shuffle=True, augment=True, device="meta")
    next(batches)
    with Copies() as copies:
        assert len(list(batches)) == 2
    assert (copies.all, copies.waiting) == (4, 0)
