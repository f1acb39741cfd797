"""Two real processes under DDP record one run: all may call, the first writes.

This file is also the program of those processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from collect.recording import Recording
from data.trajectories import open_trajectories
from predictor.model.sampling import SampleSpec

STEPS = 4


def record(rank: int, folder: Path) -> None:
    """Train in one of the processes, on its own part of the data."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    sampling = SampleSpec(weights=8, snapshots=2)
    recording = Recording(model, optimizer, total_steps=STEPS, out=folder / "out", probe=probe, sampling=sampling)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(10 * step + rank)
        loss = model(torch.randn(4, 4, generator=draw)).square().mean()
        loss.backward()
        optimizer.step()
        recording.step(loss)
        optimizer.zero_grad()
    path = recording.finish()
    assert (path is None) == (rank == 1)
    dist.destroy_process_group()


def test_one_run_is_written(tmp_path: Path) -> None:
    checkout = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (path,) = (tmp_path / "out" / "runs").glob("*.h5")
    with open_trajectories(path) as file:
        (run,) = list(file)
    assert run.step_T.tolist() == [0, 2, 4]
    assert np.isfinite(run.similarity_TL).all()


if __name__ == "__main__":
    record(int(sys.argv[1]), Path(sys.argv[2]))
