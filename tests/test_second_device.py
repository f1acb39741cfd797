"""The device that other tests run on refuses what CUDA refuses, and counts each wait of the host."""

import io

import pytest
import torch
from torch import nn

from tests.conftest import ToyNet
from tests.second_device import second_device


def waits_of(source):
    """Runs a statement on x (device, 4 numbers), host (the CPU's) and mask; returns the reasons for waiting."""
    with second_device() as syncs:
        host = torch.arange(4.0)
        x = host.to("gpu", non_blocking=True)
        mask = x > 1
        exec(source, {"torch": torch, "x": x, "host": host, "mask": mask})
    return sorted(why for _, why in syncs.elements())


def trained(device):
    """Losses of a short training of the toy network, and whether its parameters stayed the same objects."""
    with second_device():
        torch.manual_seed(0)
        net = ToyNet()
        before = [id(parameter) for parameter in net.parameters()]
        net.to(device)
        optimizer = torch.optim.AdamW(net.parameters())
        x, y = torch.randn(8, 1, 8, 8).to(device), torch.randint(3, (8,)).to(device)
        losses = []
        for _ in range(4):
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, before == [id(parameter) for parameter in net.parameters()]


def saved_and_loaded():
    """Numbers of a state that was saved from the device."""
    with second_device():
        file = io.BytesIO()
        torch.save({"x": torch.ones(3).to("gpu"), "p": nn.Parameter(torch.ones(2).to("gpu"))}, file)
        file.seek(0)
        return {name: value.tolist() for name, value in torch.load(file, weights_only=True).items()}


def a_view_shares_memory():
    """What the base shows after its view was written to, and whether their storages are one."""
    with second_device():
        base = torch.zeros(4, device="gpu")
        view = base[1:3]
        view.fill_(1.0)
        return base.tolist(), base.untyped_storage()._cdata == view.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("statement", "reasons"),
    [
        ("x + 1; x.sum(); x[1:]; x[torch.arange(2, device='gpu')]; torch.ones(2, device='gpu')", []),
        ("x.sum().item()", ["reads a number"]),
        ("float(x[0]); bool(x[0] > 1)", ["reads a number"] * 2),
        ("x.tolist()", ["reads a number"]),
        ("torch.equal(x, x)", ["reads whether tensors are equal"]),
        ("x.cpu()", ["copies to the CPU"]),
        ("x.to('cpu', non_blocking=True)", []),
        ("host.copy_(x)", ["copies to the CPU"]),
        ("host.to('gpu')", ["copies from the CPU"]),
        ("x.copy_(host, non_blocking=True)", []),
        ("torch.empty(100_000).to('gpu', non_blocking=True)", ["copies from pageable memory"]),
        ("torch.empty(100_000).pin_memory().to('gpu', non_blocking=True)", []),
        ("torch.tensor([1, 2], device='gpu')", ["copies from the CPU"]),
        ("x[mask]", ["reads how many a mask selects"]),
        ("x[mask] = 0.0", ["reads how many a mask selects"]),
        ("x[[0, 1]]", ["copies an index over"]),
        ("x[torch.tensor([0, 1])]", ["copies an index over"]),
        ("mask.nonzero()", ["reads how many are not zero"]),
        ("torch.gpu.synchronize()", ["waits for the device"]),
        ("torch.gpu.Event().synchronize()", ["waits for an event"]),
    ],
)
def test_waits_are_counted_with_their_reason(on_second_device, statement, reasons):
    assert on_second_device(waits_of, statement) == reasons


@pytest.mark.parametrize(
    "statement",
    ["x + host", "torch.stack([x[0], host[0]])", "x.index_select(0, torch.tensor([0]))", "x @ host", "host[x.long()]"],
)
def test_tensors_of_two_devices_are_refused(on_second_device, statement):
    with pytest.raises(RuntimeError, match="same device"):
        on_second_device(waits_of, statement)


def test_a_single_number_of_the_host_may_take_part(on_second_device):
    assert on_second_device(waits_of, "x * host[2]; x.fill_(host[1])") == []


def test_a_training_runs_as_on_the_cpu_and_its_parameters_stay_the_same_objects(on_second_device):
    assert on_second_device(trained, "gpu") == on_second_device(trained, "cpu")


def test_what_is_saved_from_the_device_loads_without_it(on_second_device):
    assert on_second_device(saved_and_loaded) == {"x": [1.0] * 3, "p": [1.0] * 2}


def test_a_view_shares_the_memory_of_its_base(on_second_device):
    assert on_second_device(a_view_shares_memory) == ([0.0, 1.0, 1.0, 0.0], True)
