"""Several views of a sample: which channels are sensitive, and what is kept and given of each view."""

import pytest
import torch

from predictor.cache.augmented import ViewStore, channel_similarity, sensitive_channels

CPU = torch.device("cpu")


def test_sensitive_channels_by_hand():
    first = torch.zeros(2, 5, 1, 2)
    first[:, 0] = first[:, 1] = first[:, 2] = first[:, 4] = torch.tensor([1.0, 0.0])
    second = first.clone()
    second[:, 1] = torch.tensor([0.0, 1.0])  # elsewhere
    second[:, 2] *= -1
    second[:, 4] *= 2  # 2 * 2 / (1 + 4)
    similarity_C = channel_similarity(first, second)
    assert similarity_C.tolist() == pytest.approx([1.0, 0.0, -1.0, 1.0, 0.8])  # channel 3 is 0 in both
    assert sensitive_channels(similarity_C, 0.4).tolist() == [1, 2]
    assert sensitive_channels(similarity_C, 0.01).tolist() == [2]
    assert sensitive_channels(similarity_C, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_the_channels_of_a_sequence_are_its_last_dimension():
    first = torch.ones(2, 3, 4)
    second = first.clone()
    second[:, :, 1] = -1
    assert channel_similarity(first, second).tolist() == [1, -1, 1, 1]


def views_of(sample, memory_format):
    """Three views of a sample whose channel 2 turns round, while the others change a little."""
    base = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(sample)) + 0.5
    maps = []
    for view in range(3):
        one = base * (1 + 0.1 * view)
        one[2] = (-1.0) ** view * (1 + sample + view)
        maps.append(one[None].contiguous(memory_format=memory_format))
    return maps


def filled(memory_format=torch.contiguous_format, precision="full", samples=(3, 5), **options):
    views = {sample: views_of(sample, memory_format) for sample in samples}
    like = [views[samples[0]][0], torch.zeros(1)]
    store = ViewStore(like, 1 << 20, precision=precision, views=3, channels=0.25, **options)
    for view in range(3):
        assert not store.holds(samples)
        assert store.missing(samples) == [view] * len(samples)
        store.put(samples, [torch.cat([views[i][view] for i in samples]), torch.full((len(samples),), float(view))])
    return store, views


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_view_is_its_sensitive_channels_among_the_others_of_the_first(memory_format):
    store, views = filled(memory_format)
    assert (store.holds([3, 5]), store.holds([3, 4]), len(store)) == (True, False, 2)
    assert store.missing([3, 4]) == [2, 0]
    leaf, numbers = store.unpacked(store.fetch([5, 3, 5], [2, 0, 1]), CPU)
    for row, (sample, view) in zip(leaf, [(5, 2), (3, 0), (5, 1)], strict=True):
        assert torch.equal(row[[0, 1, 3]], views[sample][0][0, [0, 1, 3]])
        assert torch.equal(row[2], views[sample][view][0, 2])
    assert numbers.tolist() == [0, 0, 0]  # of the first view: one number a sample is not a channel
    assert leaf.is_contiguous(memory_format=memory_format)
    assert torch.equal(store.get([3], CPU)[0], views[3][0])


@pytest.mark.parametrize(
    ("precision", "first", "later"),
    [("full", 4 * 4 * 4, 4 * 4), ("half", 4 * 4 * 2, 4 * 2), ("int8", 4 * 4 + 4, 4 + 4)],
)
def test_bytes_by_hand(precision, first, later):
    """A map of 4 channels of 2x2, a fingerprint, and one channel of each of two more views; one scale for all 4."""
    store, _ = filled(precision=precision)
    assert store.bytes == 2 * (first + 4) + 2 * 2 * later
    assert store.exact_bytes == 2 * (4 * 4 * 4 + 4)


def test_rounded_views_are_near_their_own():
    store, views = filled(precision="int8")
    leaf, _ = store.unpacked(store.fetch([3, 5], [1, 2]), CPU)
    assert torch.allclose(leaf[0, 2], views[3][1][0, 2], rtol=1e-2)
    assert torch.allclose(leaf[1, 2], views[5][2][0, 2], rtol=1e-2)


def test_samples_with_different_numbers_of_views_come_in_one_batch():
    views = {sample: views_of(sample, torch.contiguous_format) for sample in (0, 1)}
    store = ViewStore([views[0][0], torch.zeros(1)], 1 << 20, precision="full", views=2, channels=0.25)
    store.put([0], [views[0][0], torch.zeros(1)])
    store.put([1, 0], [torch.cat([views[1][0], views[0][1]]), torch.zeros(2)])
    assert (store.holds([0]), store.holds([1]), len(store)) == (True, False, 1)
    store.put([0, 1], [torch.cat([views[0][2], views[1][1]]), torch.zeros(2)])  # sample 0 has both of its views
    leaf, _ = store.unpacked(store.fetch([0, 1], [1, 1]), CPU)
    assert torch.equal(leaf[0, 2], views[0][1][0, 2])
    assert torch.equal(leaf[1, 2], views[1][1][0, 2])


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_a_store_goes_on_from_its_state(precision):
    store, views = filled(precision=precision)
    again = ViewStore([views[3][0], torch.zeros(1)], 1 << 20, precision=precision, views=3, channels=0.25)
    again.load_state_dict(store.state_dict())
    asked = ([3, 5, 3], [1, 2, 0])
    pairs = zip(again.unpacked(again.fetch(*asked), CPU), store.unpacked(store.fetch(*asked), CPU), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert (len(again), again.bytes, again.missing([3, 9])) == (2, store.bytes, [2, 0])
    empty = ViewStore([views[3][0], torch.zeros(1)], 1 << 20, precision=precision, views=3, channels=0.25)
    empty.load_state_dict(empty.state_dict())
    assert (len(empty), empty.bytes) == (0, 0)
