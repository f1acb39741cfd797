"""The checks themselves, on the CPU: those that hold say so, and a fault is found."""

import pytest
import torch

from evaluate.gpu import agreement, loops, subject
from evaluate.gpu.checks import CheckFailed
from evaluate.gpu.worker import outcome

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["amp-bf16", "amp-fp16", "fused", "foreach", "fsdp2", "ddp", "cache"])
def test_holds(name):
    assert outcome(name, "cpu")[0] in ("ok", "skipped")


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
