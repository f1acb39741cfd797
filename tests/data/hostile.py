"""What the tests of hostile trajectory files share: a watch over a file, and what being refused means."""

import ctypes
import os
import sys
import tracemalloc

import pytest

from data.trajectories import open_trajectories
from data.trajectories.validate import validate
from predictor.errors import FileFault

IN_OPEN = 0x20


class Watch:
    """Sees with inotify whether anybody opens a file."""

    def __init__(self, path):
        if sys.platform != "linux":
            pytest.skip("inotify is Linux's")
        libc = ctypes.CDLL(None)
        self.handle = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self.handle, os.fsencode(path), IN_OPEN) >= 0

    def opened(self):
        try:
            return bool(os.read(self.handle, 4096))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self.handle)


def refused(path, *words):
    """Reading run mlp-1 of a file is refused, with these words, and validating it finds the same."""
    with pytest.raises(FileFault) as caught, open_trajectories(path) as file:
        file.read("mlp-1")
    text = str(caught.value)
    for word in (str(path), *words):
        assert word in text
    assert "do not use it" in text or "make it" in text, "no cure"
    assert text in [str(fault) for fault in validate(path)]


def refused_in_little_memory(path, *words):
    """The same, with at most 20 MB of memory for it."""
    tracemalloc.start()
    try:
        refused(path, *words)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def put(name, make):
    """A change that replaces a field by what `make(run, name)` puts there."""

    def change(run):
        del run[name]
        make(run, name)

    return change
