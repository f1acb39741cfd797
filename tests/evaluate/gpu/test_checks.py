"""The checks themselves, on the CPU: those that hold say so, and a fault is found."""

import contextlib
import warnings

import pytest
import torch

from evaluate.gpu import agreement, devices, loops, subject, syncs
from evaluate.gpu.checks import SECOND, SECOND_DEVICE, CheckFailed
from evaluate.gpu.command import run_check
from evaluate.gpu.worker import outcome

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["amp-bf16", "amp-fp16", "fused", "foreach", "fsdp2", "ddp", "cache"])
def test_holds(name):
    assert outcome(name, "cpu")[0] in ("ok", "skipped")


@pytest.mark.skipif(not SECOND_DEVICE.exists(), reason="needs the second device")
@pytest.mark.parametrize("name", ["syncs", "syncs-gather"])
def test_holds_on_the_second_device(name, tmp_path, monkeypatch):
    """In a process of its own: a process has one such device, for good."""
    monkeypatch.setattr("evaluate.gpu.command.LOGS", tmp_path)
    status, line = run_check(name, SECOND, 100)
    assert status in ("ok", "skipped"), line


def test_is_skipped_with_a_reason():
    status, line = outcome("syncs", "cpu")
    assert status == "skipped"
    assert "GPU" in line


def test_the_first_steps_are_skipped_in_half_precision():
    assert "steps skipped" in loops.amp_fp16(CPU)


def test_a_frozen_layer_that_moves_is_found(monkeypatch):
    class Moving(subject.Loop):
        def finish(self, loss):
            loss = super().finish(loss)
            with torch.no_grad():
                self.model[0].weight += 0.01
            return loss

    monkeypatch.setattr(loops, "Loop", Moving)
    with pytest.raises(CheckFailed, match="step 11: frozen layer 0 moved"):
        loops.foreach(CPU)


def test_another_frozen_set_is_found(monkeypatch):
    monkeypatch.setattr(agreement, "POLICIES", {"linear": None})
    histories = iter([[(2, (0,))], [(2, (0, 1))]])
    monkeypatch.setattr(agreement, "_history", lambda *_: next(histories))
    with pytest.raises(CheckFailed, match=r"linear: on the CPU step 2 freezes \[0\], here step 2 \[0, 1\]"):
        agreement.frozen_sets(CPU)


def test_too_many_waits_are_found(monkeypatch):
    watch = syncs._Watch(CPU)
    for step in range(1, 9):
        with watch(step, 2):
            pass
    assert "5 steps that may wait 2 times: at most 0" in watch.figures()
    monkeypatch.setattr(syncs, "waits", lambda device: contextlib.nullcontext(["here.py:1"]))
    with watch(9, 0):
        pass
    with pytest.raises(CheckFailed, match=r"may wait 0 times: at most 1 \(1 at here.py:1\)"):
        watch.figures()


def test_waits_for_cuda_are_taken_from_its_own_warnings(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with devices.waits(torch.device("cuda")) as places:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [place.rpartition(":")[0] for place in places] == ["tests/evaluate/gpu/test_checks.py"]
    assert modes == [0, "warn", 0]


def test_other_weights_are_found(monkeypatch):
    recorded = iter([torch.ones(3, 2, 4), torch.ones(3, 2, 4).mul_(torch.tensor([1.0, 1.0, 1.1]).view(3, 1, 1))])
    monkeypatch.setattr(agreement, "_recorded", lambda *_: next(recorded))
    with pytest.raises(CheckFailed, match=r"1\.0e-01"):
        agreement.samples(CPU)


def test_an_error_is_the_result(monkeypatch):
    monkeypatch.setattr(loops, "network", lambda: subject.network().to("meta"))
    status, line = outcome("foreach", "cpu")
    assert status == "FAILED"
    assert "Error" in line
