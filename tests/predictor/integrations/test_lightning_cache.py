"""The feature cache in Lightning's Trainer: real trainings whose batches carry their samples' ids."""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
from torch.nn import functional as F

from predictor.errors import UsageError
from predictor.integrations.lightning import FreezeCallback
from tests.conftest import ToyNet
from tests.predictor.counted import alike
from tests.predictor.integrations.test_lightning import Module, TwoOptimizers, equal, fit, images
from tests.predictor.integrations.test_lightning import pytestmark as pytestmark
from tests.predictor.scripted import LookingScript, Script
from tests.predictor.twins import run_both

FRONT = {0, 1}


class Numbered(Module):
    """Batches are (ids, x, y), and the step calls its network."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[1:], batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch[1:], batch_idx)


class Calling(Numbered):
    """The step calls the module itself."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[1]), batch[2])


class ByHand(Numbered, TwoOptimizers):
    """Two optimizers, in a loop of one's own."""

    def training_step(self, batch, batch_idx):
        TwoOptimizers.training_step(self, batch[1:], batch_idx)


def numbers(batch):
    return batch[0]


def train(folder, net, ids=numbers, network="net", module=Numbered, script=None, total_steps=None, **options):
    """Three epochs of six batches, cached after the first."""
    policy = Script({0: FRONT} if script is None else script)
    callback = FreezeCallback(policy, ids=ids, network=network, total_steps=total_steps)
    data = [(index, *sample) for index, sample in enumerate(images())]
    return callback, fit(folder, net, callback, module=module, data=data, **options)


@pytest.mark.parametrize(
    ("module", "network", "options"),
    [(Numbered, "net", {}), (Calling, "", {}), (ByHand, "net", {"total_steps": 18, "accumulate": 1})],
)
def test_a_cached_training_is_the_same_and_skips_the_frozen_prefix(module, network, options, tmp_path, make_toy):
    _, plain = train(tmp_path / "plain", make_toy(), ids=None, module=module, **options)
    callback, cached = train(tmp_path / "cached", make_toy(), network=network, module=module, **options)
    assert (callback.cache.hits, callback.cache.misses, callback.cache.reason) == (12, 6, "")
    assert all(map(alike, plain.values(), cached.values()))
    assert callback.cache.bytes == 0


def test_what_a_first_look_freezes_is_cached(tmp_path, make_toy):
    callback = FreezeCallback(LookingScript({0: FRONT}), ids=numbers, network="net")
    data = [(index, *sample) for index, sample in enumerate(images())]
    fit(tmp_path, make_toy(), callback, module=Numbered, data=data)
    assert len(callback.controller.policy.looks) == 1
    assert (callback.cache.hits, callback.cache.misses, callback.cache.reason) == (12, 6, "")


def test_a_resumed_training_fills_its_cache_anew(tmp_path, make_toy):
    _, unbroken = train(tmp_path, make_toy())
    callback, resumed = train(tmp_path / "on", make_toy(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert (callback.cache.hits, callback.cache.misses) == (6, 6)
    assert all(map(alike, unbroken.values(), resumed.values()))


def test_a_step_that_breaks_leaves_the_network_as_it_was(tmp_path, make_toy):
    net = make_toy()

    class Breaks(Numbered):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.current_epoch == 2:
                raise RuntimeError("broken")
            return loss

    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, net, module=Breaks)
    assert not any("forward" in vars(module) for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_network_that_is_not_there_or_not_called_is_refused(tmp_path, make_toy):
    with pytest.raises(UsageError, match="network='model': Numbered has no module of this name"):
        train(tmp_path, make_toy(), network="model")
    with pytest.raises(UsageError, match=r"training_step did not call self\(\.\.\.\)"):
        train(tmp_path, make_toy(), network="")


def one_of_two(folder):
    """What one of two processes under DDP sees; the second's policy wants something else."""
    main = os.environ["RANK"] == "0"
    torch.manual_seed(0)
    script = {0: FRONT} if main else {1: {1}}
    callback, weights = train(folder / str(main), ToyNet(), script=script, accumulate=1, devices=2)
    frozen = [list(event.frozen) for event in callback.controller.history]
    torch.save({"weights": weights, "frozen": frozen, "hits": callback.cache.hits}, folder / f"seen-{main}.pt")


def test_two_processes_stay_in_step_and_have_a_cache_each(tmp_path):
    run_both("tests.predictor.integrations.test_lightning_cache", tmp_path)
    first, second = (torch.load(tmp_path / f"seen-{main}.pt", weights_only=True) for main in (True, False))
    assert first["frozen"] == second["frozen"] == [sorted(FRONT)]
    assert equal(first["weights"], second["weights"])
    assert min(first["hits"], second["hits"]) > 0


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
