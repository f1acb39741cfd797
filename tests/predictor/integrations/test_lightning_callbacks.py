"""Freezing beside Lightning's own callbacks, which freeze, unfreeze and average too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging

from predictor import make_policy
from predictor.integrations.lightning import FreezeCallback

EPOCHS, BATCHES = 6, 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*already exist within another group"),
    pytest.mark.filterwarnings("ignore:.*did you mean to set `Trainer"),
    pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step\\(\\)`"),
]


def batches():
    draw = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(16 * BATCHES, 8, generator=draw)
    return DataLoader(TensorDataset(x, (x.sum(1) > 40).long()), 16)


class Module(pl.LightningModule):
    def __init__(self, head_alone=False):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 2)
        self.head_alone = head_alone

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD((self.head if self.head_alone else self).parameters(), 0.05)


def fit(module, folder, *callbacks):
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches())


@pytest.mark.parametrize("averaging_first", [True, False])
def test_weight_averaging_estimates_the_statistics_of_frozen_layers(averaging_first, tmp_path):
    module = Module()
    freezing = FreezeCallback(make_policy("linear", start=0.2, end=0.7), total_steps=EPOCHS * BATCHES)
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=4)
    fit(module, tmp_path, *([averaging, freezing] if averaging_first else [freezing, averaging]))
    assert freezing.controller.history
    assert freezing.controller.history[-1].step <= EPOCHS * BATCHES
    with torch.no_grad():
        inputs = torch.cat([x for x, _ in batches()])
        mean = module.backbone[0](inputs).mean(0)
    assert torch.allclose(module.backbone[1].running_mean, mean, rtol=1e-3, atol=1e-3)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("head_alone", [True, False])
@pytest.mark.parametrize("start", [0.0, 0.6])
def test_a_backbone_that_the_trainer_opens_trains_whether_it_had_been_frozen_or_not(head_alone, start, tmp_path):
    module = Module(head_alone)
    before = [module.backbone[index].weight.detach().clone() for index in (0, 3)]
    freezing = FreezeCallback(make_policy("schedule", fronts=[(start, 1.0)]), total_steps=EPOCHS * BATCHES)
    opening = BackboneFinetuning(
        unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.5, backbone_initial_lr=0.02, verbose=False
    )
    fit(module, tmp_path, opening, freezing)
    assert not any(torch.equal(old, module.backbone[index].weight) for old, index in zip(before, (0, 3), strict=True))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert bool(freezing.controller.history[-1].unfroze) == (start == 0.0)
