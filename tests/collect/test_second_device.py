"""What `collect` records, on a device other than the CPU: the same numbers, and few waits of the host."""

import numpy as np
import pytest

from collect.hooks.cka import CKARecorder, ProbeSpec
from collect.hooks.recorder import Recorder
from collect.hooks.sieve import Sieve
from predictor.model.sampling import SampleSpec
from tests import syncs
from tests.collect.tiny import AtStep
from tests.second_device import second_device

SPEC = SampleSpec(weights=8, snapshots=6)


class Killed(Exception):
    """Stands for a kill."""


def kill(training):
    raise Killed


def hooks():
    return [Recorder(SPEC), CKARecorder(SPEC, ProbeSpec(samples=8, features=32)), Sieve()]


def recorded(device, path=None):
    """What a short training records, after a kill and a resume where there is a path."""
    with second_device():
        if path:
            with pytest.raises(Killed):
                syncs.trained(
                    [*hooks(), AtStep(7, kill)], device=device, path=path, checkpoint_seconds=0, left_out=0.25
                )
        last = [] if path is None else [AtStep(-1, kill)]
        recorder, cka, sieve = made = hooks()
        training = syncs.trained([*made, *last], device=device, path=path, checkpoint_seconds=0, left_out=0.25)
        fields = {name: value for name, value in recorder.fields().items() if name != "seconds_T"}
        curve = [{name: value for name, value in row.items() if "seconds" not in name} for row in training.curve]
        return fields, cka.similarity_TL, sieve.samples.queue.tolist(), curve


def same(one, other):
    np.testing.assert_equal(one, other)
    return True


def test_recorder_cka_and_sieve_give_what_they_give_on_the_cpu(on_second_device):
    assert same(on_second_device(recorded, "gpu"), on_second_device(recorded, "cpu"))


def test_a_training_on_the_device_resumes_from_its_checkpoint(on_second_device, tmp_path):
    assert same(on_second_device(recorded, "gpu", tmp_path / "checkpoint"), on_second_device(recorded, "cpu"))


def test_the_host_seldom_waits_for_what_is_recorded(on_second_device):
    rows = on_second_device(syncs.of_collecting)
    assert {row.what for row in rows} >= {"recorder: a snapshot", "CKA: a snapshot", "sieve: an exchange"}
    assert [str(row) for row in rows if row.waits > row.allowed] == []
