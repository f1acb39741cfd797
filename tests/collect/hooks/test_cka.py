import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collect.hooks.cka import CKARecorder, ProbeSpec
from collect.training.loop import Hook, Training, train
from collect.workloads import Recipe, Workload, load_workload
from data.sources import load_source
from data.sources.base import Source
from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.model.sampling import SampleSpec
from predictor.policies.measuring.similarity import gram
from tests.collect.tiny import TinyNet, tiny_source, tiny_workload
from tests.plain_cka import plain_cka

SPEC = SampleSpec(weights=8, snapshots=6)
PROBE = ProbeSpec(samples=9, features=2048)


def tiny_train(*hooks: Hook, workload: Workload | None = None, **options: Any) -> Training:
    return train(workload or tiny_workload(), seed=0, hooks=hooks, device="cpu", source=tiny_source(test=12), **options)


class Networks(Hook):
    """The plain twin: keeps a copy of the network at each snapshot, and the inputs."""

    def on_start(self, training: Training) -> None:
        self.inputs = training.source.probe(PROBE.samples)
        self.networks = [copy.deepcopy(training.model)]

    def on_step(self, training: Training) -> None:
        if SPEC.due(training.step, training.total_steps):
            self.networks.append(copy.deepcopy(training.model))

    def outputs(self, layer: int) -> list[Tensor]:
        found = []
        for network in self.networks:
            network.eval()
            module = layers_of(network)[layer].output
            module.register_forward_hook(lambda _module, _inputs, output: found.append(output.detach().flatten(1)))
            network(self.inputs)
        return found


def test_every_snapshot_against_networks_that_were_kept() -> None:
    similarity, twin = CKARecorder(SPEC, PROBE), Networks()
    tiny_train(similarity, twin)
    assert similarity.similarity_TL.shape == (7, 2)
    assert similarity.similarity_TL.dtype == np.float32
    for layer in range(2):
        outputs = twin.outputs(layer)
        expected = [plain_cka(output, outputs[-1]) for output in outputs]
        assert similarity.similarity_TL[:, layer] == pytest.approx(expected, abs=1e-4)
    assert similarity.similarity_TL[-1].tolist() == [1.0, 1.0]
    assert similarity.similarity_TL[0, 1] < 0.99


class Untouched(Hook):
    """Compares what a probe must leave alone, before and after: it stands on both sides of the probe."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def on_step(self, training: Training) -> None:
        modes = [module.training for module in training.model.modules()]
        buffers = [buffer.clone() for buffer in training.model.buffers()]
        hooks = [len(module._forward_hooks) for module in training.model.modules()]
        gradients = [parameter.grad.clone() for parameter in training.model.parameters()]
        self.seen.append([modes, buffers, hooks, gradients, torch.get_rng_state()])


class DropoutAlways(nn.Dropout):
    """Draws random numbers in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=True)


class Noisy(TinyNet):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.dropout = DropoutAlways(0.2)


def test_a_probe_leaves_everything_as_it_was() -> None:
    before, after = Untouched(), Untouched()
    workload = tiny_workload(Noisy)

    class FreezeNorm(Hook):
        def on_start(self, training: Training) -> None:
            training.model.norm.eval()  # as a frozen layer would be

    probed = tiny_train(FreezeNorm(), before, CKARecorder(SPEC, PROBE), after, workload=workload)
    for ours, theirs in zip(before.seen, after.seen, strict=True):
        assert ours[0] == theirs[0]
        assert ours[2] == theirs[2]
        for first, second in zip([*ours[1], *ours[3], ours[4]], [*theirs[1], *theirs[3], theirs[4]], strict=True):
            assert torch.equal(first, second)
    assert False in before.seen[0][0]
    unprobed = tiny_train(FreezeNorm(), workload=workload)
    for first, second in zip(probed.model.state_dict().values(), unprobed.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_the_probe_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = []

    def probe(self: CKARecorder, training: Training) -> Tensor:
        seconds.append([training.train_seconds, training.cpu_seconds])
        sum(range(100_000))
        assert [training.train_seconds, training.cpu_seconds] == seconds[-1]
        return torch.zeros(2, 36)

    monkeypatch.setattr(CKARecorder, "_probe", probe)
    tiny_train(CKARecorder(SPEC, PROBE))
    assert len(seconds) == 7


def test_at_most_so_many_features_at_positions_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("collect.hooks.cka.gram", lambda features_BF: seen.append(features_BF) or gram(features_BF))
    similarity, twin = CKARecorder(SPEC, ProbeSpec(samples=9, features=50)), Networks()
    tiny_train(similarity, twin)
    outputs = twin.outputs(0)
    assert outputs[0].shape == (9, 256)
    indices = None
    for features_BF, output_BF in zip(seen[::2], outputs, strict=True):
        assert features_BF.shape == (9, 50)
        found = [index for index in range(256) if any(torch.equal(output_BF[:, index], f) for f in features_BF.T)]
        indices = set(found) if indices is None else indices & set(found)
    assert indices is not None
    assert 50 <= len(indices) < 80  # some columns have twins


def test_memory_is_half_a_gram_matrix_a_layer_a_snapshot() -> None:
    class Look(Hook):
        def on_step(self, training: Training) -> None:
            self.state = similarity.state_dict()["triangles"]

    similarity, look = CKARecorder(SPEC, PROBE), Look()
    tiny_train(similarity, look)
    assert len(look.state) == 0  # released at the end
    similarity = CKARecorder(SPEC, PROBE)
    similarity.on_start(tiny_train())
    (triangle_LP,) = similarity.state_dict()["triangles"]
    assert triangle_LP.shape == (2, 9 * 8 // 2)
    assert triangle_LP.dtype == torch.float32


class Stop(Hook):
    def on_step(self, training: Training) -> None:
        if training.step == 8 and not self.resumed:
            training.stop("enough")

    def __init__(self, resumed: bool) -> None:
        self.resumed = resumed


def test_a_stopped_run_resumes_exactly(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    whole, resumed = CKARecorder(SPEC, PROBE), CKARecorder(SPEC, PROBE)
    tiny_train(whole, Stop(True))
    tiny_train(CKARecorder(SPEC, PROBE), Stop(False), checkpoint=file, checkpoint_seconds=1e9)
    tiny_train(resumed, Stop(True), checkpoint=file, checkpoint_seconds=1e9)
    np.testing.assert_array_equal(resumed.similarity_TL, whole.similarity_TL)


def test_a_run_that_diverges_has_no_similarity() -> None:
    similarity = CKARecorder(SPEC, PROBE)
    assert tiny_train(similarity, workload=tiny_workload(lr=1e30, warmup=0.0)).status == "diverged"
    assert np.isnan(similarity.similarity_TL).all()
    assert similarity.similarity_TL.shape[1] == 2


class Attending(nn.Module):
    """Attention that gives tuples, PyTorch's encoder with its fast path, a part that is never called, and the head."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.patches = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, source.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_TBC = self.patches(x_BCHW.flatten(1, 2)).transpose(0, 1)
        x_TBC = x_TBC + self.attention(x_TBC, x_TBC, x_TBC)[0]
        logits: Tensor = self.head(self.encoder(x_TBC.transpose(0, 1)).mean(dim=1))
        return logits


def test_attention_encoders_and_parts_that_are_never_called() -> None:
    workload = Workload("attending", "vit", Attending, "tiny", Recipe(epochs=1, batch_size=4, lr=0.05))
    similarity = CKARecorder(SPEC, PROBE)
    training = tiny_train(similarity, workload=workload)
    names = [layer.name for layer in training.layers]
    known = ~np.isnan(similarity.similarity_TL).any(axis=0)
    assert dict(zip(names, known.tolist(), strict=True)) == {name: name != "unused" for name in names}
    assert len(names) > 4


def test_too_few_samples() -> None:
    with pytest.raises(UsageError, match="at least 4"):
        ProbeSpec(samples=3)
    with pytest.raises(UsageError, match="tiny has 3 test samples"):
        train(tiny_workload(), seed=0, hooks=(CKARecorder(SPEC),), device="cpu", source=tiny_source(test=3))


def test_a_layers_output_is_not_that_of_a_shortcut_beside_it() -> None:
    workload = load_workload("resnet8-digits")
    source = load_source("digits")
    layers = layers_of(workload.model(source), source.probe(2))
    assert any(isinstance(layer.modules[-1], nn.Identity) for layer in layers)
    assert all(isinstance(layer.output, nn.BatchNorm2d) for layer in layers)
