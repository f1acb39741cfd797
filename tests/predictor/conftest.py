"""Windows and trajectories to train on: random walks whose steps shrink once a layer has settled."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from predictor.training.dataset import Recording, RunWindows, WindowSet, replay

FAMILIES = ("mlp", "vgg", "vit")


def settling_walk(seed, snapshots, layers, weights):
    """How long ago each layer settled (0 before), and its weights."""
    draw = torch.Generator().manual_seed(seed)
    settled_L = torch.randint(3, snapshots - 6, (layers,), generator=draw)
    ago_TL = (torch.arange(snapshots)[:, None] - settled_L[None]).clamp_min(0)
    size_TL1 = (0.1 * torch.exp(-ago_TL / 4.0)).unsqueeze(-1)
    scale_L1 = torch.rand(layers, 1, generator=draw) * 10 + 0.1
    steps_TLK = size_TL1 * torch.randn(snapshots, layers, weights, generator=draw)
    return ago_TL, (torch.randn(layers, weights, generator=draw) + steps_TLK.cumsum(0)) * scale_L1


def settling_run(run_id, family, seed, snapshots, layers, weights):
    """A layer may be frozen four snapshots after it settled."""
    ago_TL, weights_TLK = settling_walk(seed, snapshots, layers, weights)
    time_T = torch.arange(snapshots)
    gradient_TL = torch.exp(-ago_TL / 4.0)
    sizes_L = torch.full((layers,), 1000.0)
    recording = Recording(time_T, 1.0 - time_T / snapshots, weights_TLK, gradient_TL, sizes_L, snapshots - 1)
    return RunWindows(run_id, family, "digits", weights_TLK, replay(recording).features_TLF, ago_TL >= 4)


@pytest.fixture
def make_windows() -> Callable[..., WindowSet]:
    """Runs of several families; ids and seeds count on from `first`."""

    def make(families=FAMILIES, each=5, first=0, snapshots=24, layers=4, weights=32, window=6):
        names = [family for family in families for _ in range(each)]
        shape = (snapshots, layers, weights)
        runs = [settling_run(f"run{first + n:03d}", name, first + n, *shape) for n, name in enumerate(names)]
        return WindowSet(tuple(runs), window)

    return make


@pytest.fixture
def write_trajectories(tmp_path: Path) -> Callable[..., Path]:
    """The same runs as a trajectory file, with the same labels at a threshold of .98; at .99 they come one later.

    Ids and seeds count on from `first`.
    """
    from data.trajectories.trajectory import Trajectory
    from data.trajectories.writer import write_runs

    def trajectory(run_id, family, source, seed, snapshots, layers, weights):
        ago_TL, weights_TLK = settling_walk(seed, snapshots, layers, weights)
        time_T = np.arange(snapshots)
        return Trajectory(
            run_id=run_id,
            config={
                "workload": f"{family}-{source}",
                "family": family,
                "source": source,
                "seed": seed,
                "recipe": {},
                "sampling": {"weights": weights, "snapshots": snapshots - 1, "seed": 0},
                "total_steps": snapshots - 1,
            },
            provenance={},
            outcome={
                "status": "finished",
                "final_accuracy": 0.9,
                "final_loss": 0.3,
                "train_seconds": 2.0,
                "cpu_seconds": 2.0,
            },
            layer_names=tuple(f"layer{index}" for index in range(layers)),
            layer_sizes_L=np.full(layers, 1000),
            step_T=time_T,
            lr_T=1.0 - time_T / snapshots,
            loss_T=np.where(time_T > 0, 1.0, np.nan).astype("f4"),
            seconds_T=time_T * 1.0,
            weights_TLK=weights_TLK.numpy(),
            gradient_norm_TL=np.ones((snapshots, layers), "f4"),
            similarity_TL=np.minimum(0.9005 + 0.02 * ago_TL.numpy(), 1.0).astype("f4"),
        )

    def write(name="trajectories.h5", families=FAMILIES, each=5, source="digits", first=0, weights=32):
        names = [family for family in families for _ in range(each)]
        runs = [trajectory(f"run{n:03d}", name, source, n, 24, 4, weights) for n, name in enumerate(names, first)]
        write_runs(tmp_path / name, runs)
        return tmp_path / name

    return write
