"""Lightning's callback records real trainings, and goes on from Lightning's checkpoints."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging

from collect.recording.lightning import RecordingCallback
from data.trajectories import Trajectory, open_trajectories
from predictor.errors import UsageError
from predictor.model.sampling import SampleSpec
from tests.collect.tiny import TinyNet

SPEC = SampleSpec(weights=16, snapshots=3)
EPOCHS, STEPS = 3, 9  # 24 images in batches of 4, gradients of two batches added up
PROBE = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(5))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory)"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = TinyNet()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.net(x)
        return answer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step * 10 + batch_idx)  # dropout; Lightning keeps no random state
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, callback: pl.Callback, *more: pl.Callback, seed: int = 0, **options: Any) -> Module:
    draw = torch.Generator().manual_seed(0)
    loader = DataLoader([(torch.randn(1, 8, 8, generator=draw), index % 3) for index in range(24)], 4)
    ckpt_path, module = options.pop("ckpt_path", None), Module(seed)
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[callback, *more, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, "accumulate_grad_batches": 2, **options},
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return module


def recorded(path: Path | None) -> Trajectory:
    assert path is not None
    with open_trajectories(path) as file:
        (run,) = list(file)
    return run


def test_a_training_is_recorded_with_losses_gradients_and_figures(tmp_path: Path) -> None:
    callback = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC, source="noise")
    module = fit(tmp_path, callback)
    run = recorded(callback.path)
    assert run.step_T.tolist() == [0, 3, 6, 9]
    assert run.loss_T[1:] == pytest.approx(np.reshape(module.losses, (3, 6)).mean(axis=1))
    assert np.isfinite(run.gradient_norm_TL[1:]).all()
    assert run.layer_names == ("net.conv", "net.linear")
    assert run.similarity_TL[-1] == pytest.approx([1.0, 1.0])
    assert run.outcome["final_loss"] == pytest.approx(module.trainer.callback_metrics["val_loss"].item())
    assert (run.config["family"], run.config["total_steps"]) == ("Module", STEPS)


def test_recording_changes_no_number_of_the_training(tmp_path: Path) -> None:
    with_it = fit(tmp_path, RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC))
    without = fit(tmp_path, pl.Callback())
    for ours, theirs in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_unbroken(tmp_path: Path, stop: int) -> None:
    unbroken = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC)
    fit(tmp_path / "unbroken", unbroken)
    theirs = recorded(unbroken.path)
    assert unbroken.path is not None
    unbroken.path.unlink()
    resumed = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC)
    fit(tmp_path / "resumed", resumed, seed=1, ckpt_path=tmp_path / "unbroken" / f"epoch={stop - 1}.ckpt")
    ours = recorded(resumed.path)
    assert ours.run_id == theirs.run_id
    for name in ("step_T", "lr_T", "loss_T", "weights_TLK"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    np.testing.assert_allclose(ours.similarity_TL, theirs.similarity_TL, atol=1e-5)


def test_accumulation_that_changes_by_epoch(tmp_path: Path) -> None:
    callback = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC)
    fit(tmp_path, callback, GradientAccumulationScheduler({0: 1, 1: 4}), accumulate_grad_batches=1)
    run = recorded(callback.path)  # 6, 2 and 2 steps: of the last, two batches are left over
    assert run.config["total_steps"] == run.step_T[-1] == 10


def test_a_checkpoint_from_before_the_callback_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, pl.Callback())
    with pytest.raises(UsageError, match="checkpoint at step 3"):
        fit(tmp_path, RecordingCallback(tmp_path / "out", PROBE), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_training_without_an_end_needs_its_length(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"RecordingCallback\(\.\.\., total_steps=N\)"):
        fit(tmp_path, RecordingCallback(tmp_path / "out", PROBE), max_epochs=-1)
    callback = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC)
    fit(tmp_path, callback, max_epochs=-1, max_steps=5)
    assert recorded(callback.path).step_T[-1] == 5


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_averaged_weights_are_not_taken_for_the_final_ones(tmp_path: Path) -> None:
    callback = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC)
    fit(tmp_path, callback, StochasticWeightAveraging(0.02, 1), accumulate_grad_batches=1)
    run = recorded(callback.path)
    assert run.step_T.tolist() == [0, 6, 12, 18]
    assert run.similarity_TL[-1] == pytest.approx([1.0, 1.0])


class AccumulatesItself(Module):
    """A loop of one's own that steps in every third batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 0:
            self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            self.optimizers().step()


def test_a_loop_that_accumulates_itself_needs_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Module", AccumulatesItself)
    with pytest.raises(UsageError, match=r"manual optimization .*RecordingCallback\(\.\.\., total_steps=N\)"):
        fit(tmp_path, RecordingCallback(tmp_path / "out", PROBE), accumulate_grad_batches=1)
    callback = RecordingCallback(tmp_path / "out", PROBE, sampling=SPEC, total_steps=6)
    fit(tmp_path, callback, accumulate_grad_batches=1)
    assert recorded(callback.path).step_T.tolist() == [0, 2, 4, 6]
