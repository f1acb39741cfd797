import time
import warnings

import pytest
import torch
from torch import nn

from collect.training.device import Clock, Precision, deterministic, deterministic_environment, pick_device
from collect.training.loop import train
from collect.training.provenance import determinism
from predictor.errors import UsageError
from tests.collect.tiny import tiny_source, tiny_workload


@pytest.mark.parametrize("name", ["tpu", "xpu", "cuda:77" if torch.cuda.is_available() else "cuda"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match=f"device='{name}'"):
        pick_device(name)


def test_the_device_is_picked() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


def test_no_mixed_precision_on_the_cpu() -> None:
    precision = Precision(torch.device("cpu"), wanted=True)
    assert precision.dtype == torch.float32
    assert not precision.scaler.is_enabled()
    with precision.forward():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


def test_a_clock_that_stands_still_is_not_started_by_a_pause() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.paused():
        pass
    time.sleep(0.01)
    assert clock.wall_seconds == clock.cpu_seconds == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("native", [True, False])
def test_mixed_precision_on_cuda(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    training = train(tiny_workload(epochs=10, clip_norm=1.0), seed=0, device="cuda", source=tiny_source())
    assert training.precision.scaler.is_enabled() != native
    assert training.curve[-1]["test_accuracy"] > 0.8


def test_operators_of_a_gpu_are_deterministic_and_what_was_set_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: None)
    before, show = determinism(), warnings.showwarning
    with deterministic(torch.device("cuda")) as without:
        inside = determinism()
        warnings.showwarning("bincount does not have a deterministic implementation. And so on", UserWarning, "", 1)
    assert inside == {**before, "deterministic_algorithms": True, "warn_only": True, "cudnn_deterministic": True}
    assert without == ["bincount does not have a deterministic implementation"]
    assert (determinism(), warnings.showwarning) == (before, show)
    with deterministic(torch.device("cpu")):
        assert determinism() == before


def test_the_users_own_workspace_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert deterministic_environment() == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert deterministic_environment() == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
