"""Lightning's callback: real trainings that freeze, stop, resume from their checkpoint, and end equal."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from predictor import layers_of, make_policy
from predictor.errors import UsageError
from predictor.integrations.lightning import FreezeCallback
from predictor.model.config import FEATURES
from predictor.model.features import log_lr
from tests.predictor.scripted import WatchingScript

EPOCHS, STEPS = 3, 9  # 24 images in batches of 4, gradients of two batches added up
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory)"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Module(pl.LightningModule):
    """The toy network, trained with AdamW under a schedule."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step * 10 + batch_idx)  # dropout; Lightning keeps no random state
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        assert not self.net.training
        x, y = batch
        self.log("loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        # As many write it: what is frozen by now would never train again.
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def images():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 8, 8, generator=draw), index % 3) for index in range(24)]


def fit(folder, net, callback, epochs=EPOCHS, ckpt_path=None, accumulate=2, module=Module, data=None, devices=1):
    """Train; leaves a checkpoint of each epoch in `folder`. devices: processes that train together."""
    loader = DataLoader(images() if data is None else data, 4)
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)],
        accelerator="cpu",
        devices=devices,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module(net), loader, loader, ckpt_path=ckpt_path)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_policies_are_asked_once_an_optimizer_step_while_gradients_stand(tmp_path, make_toy):
    callback = FreezeCallback(WatchingScript({3: {0, 1}, 6: ()}))
    fit(tmp_path, make_toy(), callback)
    assert callback.controller.total_steps == STEPS
    assert callback.controller.policy.observed == [(step, True) for step in range(1, STEPS + 1)]
    assert [event.step for event in callback.controller.history] == [3, 6]


def test_frozen_layers_stand_still_through_validation_and_the_others_train(tmp_path, make_toy):
    net = make_toy()
    before = copy.deepcopy(net.state_dict())
    fit(tmp_path, net, FreezeCallback(WatchingScript({0: {0, 1}})))
    still = {name for name, tensor in net.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if name.startswith(("body.0", "body.1.", "body.3", "body.4"))}


@pytest.mark.parametrize(("stop", "steps"), [(True, 5), (False, STEPS)])
def test_training_may_end_when_all_layers_are_frozen(stop, steps, tmp_path, make_toy):
    net = make_toy()
    callback = FreezeCallback(WatchingScript({2: {0, 1}, 5: range(len(layers_of(net)))}), stop=stop)
    fit(tmp_path, net, callback)
    assert callback.controller.view.step == steps


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_unbroken_bit_for_bit(stop, tmp_path, make_toy):
    answers = {2: {0, 1}, 8: {1}}
    unbroken = FreezeCallback(WatchingScript(answers))
    expected = fit(tmp_path / "unbroken", make_toy(), unbroken)
    resumed = FreezeCallback(WatchingScript(answers))
    path = tmp_path / "unbroken" / f"epoch={stop - 1}.ckpt"  # two layers are frozen there
    assert equal(expected, fit(tmp_path / "resumed", make_toy(seed=1), resumed, ckpt_path=path))
    assert resumed.controller.history == unbroken.controller.history
    assert resumed.controller.frozen == set()  # let go
    assert resumed.state_dict()["frozen"] == [1]  # a checkpoint that is written now goes on from where it was


def test_a_policy_with_tensors_in_its_state_resumes_too(tmp_path, make_toy, make_predictor_file):
    def make():
        return FreezeCallback(make_policy("smartfrz", predictor=make_predictor_file()))

    unbroken = make()
    expected = fit(tmp_path / "unbroken", make_toy(), unbroken)
    assert 0 < unbroken.controller.history[0].step <= 3
    path = tmp_path / "unbroken" / "epoch=0.ckpt"
    assert equal(expected, fit(tmp_path / "resumed", make_toy(seed=1), make(), ckpt_path=path))


def test_smartfrz_sees_the_rates_of_the_steps_though_the_schedule_has_gone_on(tmp_path, make_toy, make_predictor_file):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.1, window=STEPS + 1))
    callback = FreezeCallback(policy)
    fit(tmp_path, make_toy(), callback)
    optimizer = torch.optim.SGD(make_toy().parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS)
    rates = schedule.get_last_lr()  # at step 0
    for _ in range(STEPS):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step() if len(rates) <= STEPS else None
    expected = [log_lr(rate, max(rates[: index + 1])) for index, rate in enumerate(rates)]
    history = callback.controller.policy._history
    seen = [float(features[0, FEATURES.index("log_lr")]) for features in history._features]
    assert seen == pytest.approx(expected)


class LeavesOneOut(Module):
    """Has nothing to learn from one of the batches, of which each is a step."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_smartfrz_goes_on_after_a_batch_that_was_left_out(tmp_path, make_toy, make_predictor_file):
    callback = FreezeCallback(make_policy("smartfrz", predictor=make_predictor_file(probability=0.1)))
    fit(tmp_path, make_toy(), callback, epochs=1, accumulate=1, module=LeavesOneOut)
    assert callback.controller.view.step == 6


def test_a_checkpoint_from_before_the_callback_is_refused(tmp_path, make_toy):
    fit(tmp_path / "without", make_toy(), pl.Callback())
    with pytest.raises(UsageError, match="checkpoint at step 3 was written without this callback"):
        fit(tmp_path, make_toy(), FreezeCallback(WatchingScript({})), ckpt_path=tmp_path / "without" / "epoch=0.ckpt")


def test_one_callback_serves_one_training_after_another(tmp_path, make_toy):
    callback = FreezeCallback(WatchingScript({2: {0, 1}}))
    net = make_toy()
    first = fit(tmp_path / "first", net, callback)
    assert all(parameter.requires_grad for parameter in net.parameters())  # let go at the end
    assert equal(first, fit(tmp_path / "second", make_toy(), callback))


def test_without_accumulation_each_batch_is_a_step(tmp_path, make_toy):
    callback = FreezeCallback(WatchingScript({}))
    fit(tmp_path, make_toy(), callback, epochs=1, accumulate=1)
    assert callback.controller.total_steps == len(callback.controller.policy.observed) == 6


def test_layers_can_be_named(tmp_path, make_toy):
    callback = FreezeCallback(
        WatchingScript({1: {0}}), layers=lambda module: layers_of(module, patterns=["net.body.3*"])
    )
    fit(tmp_path, make_toy(), callback)
    assert [layer.name for layer in callback.controller.layers] == ["net.body.3*"]


class TwoOptimizers(Module):
    """Body and head apart, in a loop of one's own."""

    automatic_optimization = False

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net.body, self.net.head)]


def test_several_optimizers_count_as_one_step_a_batch(tmp_path, make_toy):
    def run(callback):
        return fit(
            tmp_path / str(callback._total_steps), make_toy(), callback, epochs=2, accumulate=1, module=TwoOptimizers
        )

    callback = FreezeCallback(make_policy("linear", start=0.0), total_steps=12)
    run(callback)
    assert [event.step for event in callback.controller.history] == [6, 12]  # each optimizer's last layer trains on
    with pytest.raises(UsageError, match=r"2 optimizers: .*total_steps=N"):
        run(FreezeCallback(make_policy("linear")))


def test_a_share_of_the_steps_is_refused():
    with pytest.raises(UsageError, match=r"takes a share of 0\.5 of the steps"):
        FreezeCallback(make_policy("shorter", budget=0.5))
