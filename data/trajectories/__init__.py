"""Trajectories: the weights of a network, sampled through its training, and what is known about that training.

The public names are imported at first use, so that `--help` does not wait for h5py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.trajectories.folder import GatherFolder as GatherFolder
    from data.trajectories.labels import LabelRule as LabelRule
    from data.trajectories.reader import TrajectoryFile as TrajectoryFile
    from data.trajectories.reader import open_trajectories as open_trajectories
    from data.trajectories.trajectory import Trajectory as Trajectory
    from data.trajectories.writer import write_runs as write_runs

_HOME = {
    "GatherFolder": "data.trajectories.folder",
    "LabelRule": "data.trajectories.labels",
    "Trajectory": "data.trajectories.trajectory",
    "TrajectoryFile": "data.trajectories.reader",
    "open_trajectories": "data.trajectories.reader",
    "write_runs": "data.trajectories.writer",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
