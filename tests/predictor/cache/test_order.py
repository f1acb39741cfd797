"""Shuffling in chunks: everything comes once, and each chunk's rows lie together in a store."""

import pytest
import torch

from predictor.cache.order import chunked_order
from predictor.errors import UsageError


@pytest.mark.parametrize(("size", "chunk"), [(24, 4), (23, 4), (5, 100), (6, 1), (0, 3)])
def test_every_sample_comes_once_in_another_order_each_epoch(size, chunk):
    orders = [chunked_order(size, chunk, seed=3, epoch=epoch) for epoch in range(3)]
    assert all(order.sort().values.tolist() == list(range(size)) for order in orders)
    assert torch.equal(orders[1], chunked_order(size, chunk, seed=3, epoch=1))
    if size > 4:
        assert len({tuple(order.tolist()) for order in orders}) == 3
        assert not torch.equal(orders[0], chunked_order(size, chunk, seed=4, epoch=0))


def test_a_later_epoch_reads_the_rows_of_the_first_chunk_by_chunk():
    first, later = (chunked_order(240, 8, seed=1, epoch=epoch) for epoch in (0, 5))
    row_of_N = torch.empty(240, dtype=torch.int64)
    row_of_N[first] = torch.arange(240)  # a store keeps rows in the order in which samples first come
    starts = []
    for rows in row_of_N[later].split(8):
        low = int(rows.min())
        assert rows.sort().values.tolist() == list(range(low, low + 8))
        assert rows.tolist() != list(range(low, low + 8))  # and are shuffled among themselves
        starts.append(low)
    assert starts != sorted(starts)
    neighbours = (first.view(-1, 8).sort(dim=1).values.diff(dim=1) == 1).float().mean()
    assert neighbours < 0.2  # chunks are not made of samples that are neighbours in the data set


def test_random_numbers_of_others_stand_still_and_a_chunk_has_a_sample():
    before = torch.get_rng_state()
    chunked_order(10, 3)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UsageError, match="chunk=0"):
        chunked_order(10, 0)
