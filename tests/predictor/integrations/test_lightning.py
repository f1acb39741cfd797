"""Lightning's callback: real trainings that freeze, stop, resume from their checkpoint, and end equal."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

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


def fit_with(folder, callbacks, net, epochs=EPOCHS, module=Module, logger=False, accumulate=1, data=None, **options):
    loader = DataLoader(images() if data is None else data, 4)
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module(net), loader, loader)
    return trainer


class Plain(Module):
    """Without a schedule, which has a fixed length."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps"), [({0: 1, 1: 4}, 3, 6 + 2 + 2), ({2: 3}, 3, 6 + 6 + 2), ({0: 4, 9: 1}, 1, 2)]
)
@pytest.mark.parametrize("first", [True, False])
def test_accumulation_that_changes_by_epoch_is_counted(schedule, epochs, steps, first, tmp_path, make_toy):
    callback = FreezeCallback(WatchingScript({}))
    both = [GradientAccumulationScheduler(schedule), callback]
    fit_with(tmp_path, both if first else both[::-1], make_toy(), epochs, Plain)
    assert callback.controller.total_steps == steps
    assert len(callback.controller.policy.observed) == steps


@pytest.mark.parametrize(("options", "steps"), [({"max_steps": 4}, 4), ({"limit_train_batches": 3}, 9)])
def test_shorter_trainings_are_counted(options, steps, tmp_path, make_toy):
    callback = FreezeCallback(WatchingScript({}))
    fit_with(tmp_path, [callback], make_toy(), module=Plain, **options)
    assert callback.controller.total_steps == steps == len(callback.controller.policy.observed)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(images())


@pytest.mark.filterwarnings("ignore:.*IterableDataset")
def test_a_training_whose_length_is_not_known_needs_it(tmp_path, make_toy):
    with pytest.raises(UsageError, match=r"total_steps=N"):
        fit_with(tmp_path, [FreezeCallback(WatchingScript({}))], make_toy(), module=Plain, data=Endless())
    callback = FreezeCallback(WatchingScript({2: {0}}), total_steps=18)
    fit_with(tmp_path, [callback], make_toy(), module=Plain, data=Endless())
    assert len(callback.controller.policy.observed) == 18


class AccumulatesItself(Plain):
    """A loop of one's own that steps in every third batch."""

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_a_loop_that_accumulates_itself_needs_its_length(tmp_path, make_toy):
    with pytest.raises(UsageError, match=r"manual optimization .*total_steps=N"):
        fit_with(tmp_path, [FreezeCallback(WatchingScript({}))], make_toy(), module=AccumulatesItself)
    callback = FreezeCallback(WatchingScript({2: {0}}), total_steps=6)
    fit_with(tmp_path, [callback], make_toy(), module=AccumulatesItself)
    assert len(callback.controller.policy.observed) == 6


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_get_their_statistics_though_layers_were_frozen(first, tmp_path, make_toy):
    """StochasticWeightAveraging collects BatchNorm's statistics anew, in an epoch of its own, in training mode."""
    callback, average = FreezeCallback(WatchingScript({2: {0, 1}})), StochasticWeightAveraging(0.02, 1)
    net = make_toy()
    fit_with(tmp_path, [callback, average] if first else [average, callback], net, module=Plain)
    assert callback.controller.total_steps == 18 == len(callback.controller.policy.observed)
    assert callback.controller.history[-1].frozen == (0, 1)
    norm = net.body[1]
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    torch.optim.swa_utils.update_bn(DataLoader(images(), 4), net)
    assert norm.num_batches_tracked == 6
    for ours, theirs in zip(statistics, (norm.running_mean, norm.running_var), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


class Numbered(Plain):
    """Gets each sample's number with it."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[1]), batch[2])

    def validation_step(self, batch, batch_idx):
        pass


def test_averaged_weights_beside_a_cache(tmp_path, make_toy):
    callback = FreezeCallback(WatchingScript({2: {0, 1}}), ids=lambda batch: batch[0], network="net")
    data, net = [(index, *row) for index, row in enumerate(images())], make_toy()
    fit_with(tmp_path, [callback, StochasticWeightAveraging(0.02, 1)], net, module=Numbered, data=data)
    assert callback.cache.hits
    assert net.body[1].running_mean.any()


def test_weight_averaging_beside_freezing(tmp_path, make_toy):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").WeightAveraging
    before, net = make_toy(), make_toy()
    fit_with(tmp_path, [FreezeCallback(WatchingScript({0: {0, 1}})), averaging()], net, module=Plain)
    assert torch.allclose(net.body[0].weight, before.body[0].weight)


def test_the_freezing_is_logged_where_the_trainer_logs(tmp_path, make_toy):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = FreezeCallback(WatchingScript({0: {0}, 7: {0, 1}}))
    logger = TensorBoardLogger(tmp_path, name="run")
    fit_with(tmp_path, [callback], make_toy(), module=Plain, logger=logger, log_every_n_steps=5)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    values = {
        name: {event.step: event.value for event in events.Scalars(f"freeze/{name}")}
        for name in ("frozen_layers", "saved_share", "step_flops_share")
    }
    assert values["frozen_layers"] == {0: 1, 5: 1, 7: 2, 10: 2, 15: 2, 18: 2}
    assert values["saved_share"][18] == pytest.approx(callback.controller.timeline.saved_share)
    assert 0 < values["step_flops_share"][18] < values["step_flops_share"][5] < 1


def test_the_freezing_is_logged_to_a_table(tmp_path, make_toy):
    logger = CSVLogger(tmp_path, name="run")
    fit_with(
        tmp_path,
        [FreezeCallback(WatchingScript({3: {0}}), dry_run=True)],
        make_toy(),
        module=Plain,
        logger=logger,
        log_every_n_steps=5,
    )
    assert "freeze_dry_run/saved_share" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_a_dry_run_freezes_nothing_and_says_so(tmp_path, make_toy, capsys):
    nets = make_toy(), make_toy()
    fit_with(tmp_path, [FreezeCallback(WatchingScript({2: {0, 1}}), dry_run=True)], nets[0], module=Plain)
    fit_with(tmp_path, [], nets[1], module=Plain)
    assert equal(nets[0].state_dict(), nets[1].state_dict())
    assert capsys.readouterr().out.count("dry run of 18 steps") == 1


def test_a_validation_afterwards_finds_all_layers_released(tmp_path, make_toy):
    net = make_toy()
    trainer = fit_with(tmp_path, [FreezeCallback(WatchingScript({2: {0, 1}}))], net, module=Plain)
    after = copy.deepcopy(net.state_dict())
    trainer.validate(trainer.lightning_module, dataloaders=DataLoader(images(), 4), verbose=False)
    assert equal(net.state_dict(), after)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_second_fit_of_the_same_trainer_goes_on_or_says_what_it_needs(tmp_path, make_toy):
    net, loader = make_toy(), DataLoader(images(), 4)
    known = FreezeCallback(WatchingScript({2: {0}}), total_steps=24)
    trainer = fit_with(tmp_path, [known], net, module=Plain)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(trainer.lightning_module, loader, loader)
    assert known.controller.view.step == 24
    assert [event.step for event in known.controller.history] == [2]
    trainer = fit_with(tmp_path, [FreezeCallback(WatchingScript({2: {0}}))], make_toy(), module=Plain)
    trainer.fit_loop.max_epochs = 4
    with pytest.raises(UsageError, match="training of 18 steps, and total_steps=24"):
        trainer.fit(trainer.lightning_module, loader, loader)


class CallsItsParts(Plain):
    """Its training step calls two modules in it, and never the module itself."""

    def __init__(self, net):
        super().__init__(net)
        self.first = torch.nn.Linear(8, 3)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), *(torch.nn.Linear(64, n) for n in (64, 64, 8)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.first(self.net(x)), y)


@pytest.mark.parametrize("dry_run", [False, True])
def test_where_no_pass_could_be_counted_the_reason_is_said(dry_run, tmp_path, make_toy, capsys):
    callback = FreezeCallback(make_policy("static", layers=1), dry_run=dry_run)
    fit_with(tmp_path, [callback], make_toy(), module=CallsItsParts)
    assert "FLOPs are not reported" in capsys.readouterr().out
