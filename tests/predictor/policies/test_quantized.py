"""The int8 reference against roundings done by hand."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from predictor.policies.measuring.quantized import QuantizedReference, rounded


def test_one_scale_for_each_output_channel():
    weight_OI = torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.0]])
    int8_OI, scales_O1 = rounded(weight_OI)
    assert int8_OI.dtype == torch.int8
    assert int8_OI.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 0]] or int8_OI[2, 1] == 63  # 63.5 either way
    assert scales_O1.flatten().tolist() == pytest.approx([1.0, 1.0, 0.02])


def test_a_convolutions_kernel_shares_its_channels_scale():
    weight_OIHW = torch.stack([torch.full((2, 3, 3), 0.5), torch.full((2, 3, 3), -8.0)])
    int8_OIHW, scales_O111 = rounded(weight_OIHW)
    assert scales_O111.shape == (2, 1, 1, 1)
    assert int8_OIHW.unique().tolist() == [-127, 127]
    assert torch.allclose(int8_OIHW * scales_O111, weight_OIHW)


def test_it_keeps_what_was_and_rounds_weights_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model(torch.randn(9, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = QuantizedReference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model[1].running_mean.add_(1.0)
    weights = reference.weights()
    assert weights.keys() == before.keys() - {"1.num_batches_tracked"}
    for name in ("0.bias", "1.weight", "1.running_mean", "1.running_var"):
        assert torch.equal(weights[name], before[name])
    for name in ("0.weight", "2.weight"):
        error, half_a_step = (weights[name] - before[name]).abs(), before[name].abs().amax(1, keepdim=True) / 254
        assert (error <= half_a_step * 1.001).all()
        assert error.max() > 0


def test_its_state_is_int8_and_gives_the_same_weights_bit_for_bit():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).to(torch.bfloat16)
    reference = QuantizedReference(model)
    state = reference.state_dict()
    assert {tensor.dtype for tensor in state["rounded"].values()} == {torch.int8}
    again = QuantizedReference.of_state(state, model)
    assert all(torch.equal(tensor, again.weights()[name]) for name, tensor in reference.weights().items())
    assert functional_call(model, again.weights(), torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
