"""Reading trajectories without the child process, for tests that look into the reader or read many files."""

import pytest

from data.trajectories import child


@pytest.fixture
def in_process(monkeypatch):
    """HDF5 runs in this process, so that what is patched here has an effect."""
    monkeypatch.setattr("data.trajectories.reader.ask", child.answer)
