"""Every policy and the cache on a device other than the CPU: the same decisions, and how often the host waits."""

import functools
import io

import pytest
import torch
from torch.nn import functional as F

from predictor import FeatureCache, FreezeController
from predictor.policies import POLICIES
from tests import syncs
from tests.predictor.scripted import Script
from tests.second_device import second_device

MEASURING = [
    "freezeout",
    "spfde",
    "autofreeze",
    "pipetransformer",
    "greentrainer",
    "slimfit",
    "grades",
    "spectrum",
    "autorgn",
    "egeria",
    "simfreeze",
    "smartfrz",
]


@functools.cache
def frozen_by_step(name, device="cpu", moved=False):
    """The frozen set after each step of a training under a policy."""
    with second_device():
        return syncs.Run.under(name, device, moved=moved).frozen_by_step()


def frozen_when_resumed(name, device, then):
    """The same of a training that goes on in the middle, on another device perhaps."""
    with second_device():
        first, second = syncs.Run.under(name, device), syncs.Run.under(name, then)
        before = first.frozen_by_step(syncs.STEPS // 2 + 1)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        return before + second.frozen_by_step(syncs.STEPS - len(before))


def losses_with_cache(device):
    """Losses of three epochs over 32 samples with a frozen prefix that grows once, and how many batches were hits."""
    with second_device():
        run = syncs.Run(Script({0: [0], 9: [0, 1]}), device)
        cache = FeatureCache(run.controller)
        torch.manual_seed(0)
        x, y = torch.randn(32, 1, 8, 8).to(device), torch.randint(3, (32,)).to(device)
        losses = []
        for number in range(16):
            ids = torch.arange(8) + number % 4 * 8
            torch.manual_seed(number)
            with cache.batch(ids):
                loss = F.cross_entropy(run.net(x[ids[0] :][:8]), y[ids[0] :][:8])
            loss.backward()
            run.optimizer.step()
            run.controller.step()
            run.optimizer.zero_grad()
            losses.append(loss.item())
        return losses, cache.hits


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_freezes_as_on_the_cpu_also_when_the_model_is_moved_later(on_second_device, name):
    expected = on_second_device(frozen_by_step, name)
    assert any(expected) == (name not in ("none", "shorter", "stopped", "pipetransformer"))
    assert on_second_device(frozen_by_step, name, "gpu") == expected
    assert on_second_device(frozen_by_step, name, "gpu", True) == expected


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize("then", ["gpu", "cpu"])
def test_a_training_goes_on_on_either_device(on_second_device, name, then):
    assert on_second_device(frozen_when_resumed, name, "gpu", then) == on_second_device(frozen_by_step, name)


@pytest.mark.parametrize("name", MEASURING)
def test_the_host_seldom_waits_under_any_policy(on_second_device, name):
    rows = on_second_device(syncs.of_policy, name)
    assert rows
    assert [str(row) for row in rows if row.waits > row.allowed] == []


def test_the_cache_gives_the_losses_of_the_cpu(on_second_device):
    losses, hits = on_second_device(losses_with_cache, "gpu")
    assert (losses, hits) == on_second_device(losses_with_cache, "cpu")
    assert hits >= 6


def test_the_host_waits_at_most_once_at_a_hit_of_the_cache(on_second_device):
    rows = on_second_device(syncs.of_cache)
    assert "cache: a hit" in {row.what for row in rows}
    assert [str(row) for row in rows if row.waits > row.allowed] == []


def waits_while_a_change_is_reported():
    """Waits in each step of a training whose freeze is reported, and what was said."""
    lines = []
    with second_device() as counted:
        run = syncs.Run(Script({1: [0]}))
        run.controller = FreezeController(run.net, run.optimizer, run.policy, total_steps=syncs.STEPS, say=lines.append)
        waits = []
        for _ in range(30):
            counted.clear()
            run.step()
            waits.append(counted.count("predictor/freezing/"))
    return waits, lines


def test_what_a_freeze_saves_is_reported_with_one_wait_in_all(on_second_device):
    waits, lines = on_second_device(waits_while_a_change_is_reported)
    assert sum(waits) == 1
    assert "FLOPs" in lines[0]
