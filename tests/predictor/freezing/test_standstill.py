"""How modules of frozen layers stand still, kind by kind; and that copies of them do not have to."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

from predictor import FreezeController, layers_of, make_policy, release
from predictor.freezing.uses_of_mode import uses_of_mode
from tests.predictor.scripted import Script


def freeze_all(model, layers=None):
    """A controller that has frozen all layers of a model in training."""
    layers = layers or layers_of(model.train())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = make_policy("static", share=1.0)
    return FreezeController(model, optimizer, policy, total_steps=4, layers=layers, say=None)


class Encoder(nn.Module):
    """torch's own encoder under a padding mask."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True), 2)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0))


TOKENS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])


@pytest.mark.parametrize("prefix", range(8))
def test_a_frozen_prefix_of_torchs_encoder_computes_what_one_frozen_by_hand_does(prefix):
    outputs = []
    for by_hand in (True, False):
        model = Encoder().train()
        layers = layers_of(model)
        if by_hand:
            for layer in layers[:prefix]:
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        policy = make_policy("static", layers=0 if by_hand else prefix)
        FreezeController(model, optimizer, policy, total_steps=4, layers=layers, say=None)
        outputs.append(model(TOKENS))
    assert torch.allclose(*outputs, atol=1e-6)


def test_attention_has_no_dropout_while_it_is_frozen_and_again_in_copies_and_after_a_release():
    model = Encoder(dropout=0.5)
    controller = freeze_all(model)
    assert torch.equal(model(TOKENS), model(TOKENS))
    attention = model.encoder.layers[0].self_attn
    twin = copy.deepcopy(model)
    assert (attention.dropout, twin.encoder.layers[0].self_attn.dropout) == (0, 0.5)
    assert not torch.equal(twin.train()(TOKENS), twin(TOKENS))
    controller.release()
    assert attention.dropout == 0.5
    assert not torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_stays_in_training_without_its_dropout(kind):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.memory, self.head = nn.Embedding(9, 8), kind(8, 8, 2, dropout=0.5), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.memory(self.embedding(x))[0])

    model = Tagger().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = FreezeController(model, optimizer, Script({0: {1}}), total_steps=4, say=None)
    x = torch.arange(8).reshape(4, 2)
    assert controller.layers[1].modules == (model.memory,)
    assert model.memory.training  # cuDNN refuses the backward pass otherwise
    assert torch.equal(model(x), model(x))
    assert not model.eval().memory.training
    assert model.train().memory.training
    controller.release()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_does_not_iterate_on(normed):
    model = nn.Sequential(normed(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    controller = freeze_all(model)
    x = torch.randn(2, 8)
    model.train()
    assert torch.equal(model(x), model(x))
    controller.release()
    vector = next(buffer for name, buffer in model[0].named_buffers() if name.endswith("_u"))
    before = vector.copy_(nn.functional.normalize(torch.ones(8), dim=0)).clone()  # it may have settled for good
    model(x)
    assert not torch.equal(vector, before)


def test_hooks_that_look_at_the_mode_of_a_plain_module_go_on():
    """As NEFTune's on an embedding."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(16, 2))
    model[0].register_forward_hook(lambda module, args, output: output + module.training)
    freeze_all(model)
    x = torch.zeros(1, 2, dtype=torch.int64)
    assert not torch.equal(model.train()[0](x), model.eval()[0](x))


def test_dropout_is_switched_on_for_a_validation_by_its_flag_or_in_a_copy():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 2))
    freeze_all(model)
    x = torch.ones(4, 8)
    model.eval()[1].train()
    assert not model[1].training
    assert copy.deepcopy(model)[1].train().training
    model[1].training = True
    assert not torch.equal(model(x), model(x))
    assert not model.train()[1].training


class Normalizing(nn.Module):
    """Keeps statistics of its own, as custom normalizations do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0).detach(), 0.1)
        return (x - self.mean) @ self.weight


class Supervised(nn.Module):
    """Returns more in training, as networks with auxiliary outputs and the parts of detectors do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.first(x)
        if self.training:
            return self.second(hidden), hidden
        return self.second(hidden)


def test_a_users_statistics_stand_still_and_a_users_results_keep_their_form():
    model = nn.Sequential(Normalizing(), Supervised(), nn.Linear(8, 2)).train()
    layers = layers_of(model, patterns=["0", "1.*"])
    controller = freeze_all(model, layers)
    mean = model[0].mean.clone()
    hidden = model.train()[0](torch.randn(4, 8))
    assert torch.equal(mean, model[0].mean)
    assert len(model[1](hidden)) == 2
    controller.release()
    model[0](torch.randn(4, 8))
    assert not torch.equal(mean, model[0].mean)


class GuardedNoise(nn.Module):
    """Noise behind a guard clause."""

    def forward(self, x):
        if not self.training:
            return x
        return x + torch.randn_like(x)


class GuardedDropout(nn.Module):
    """Dropout behind a guard clause with a second condition."""

    rate = 0.5

    def forward(self, x):
        evaluating = not self.training
        if self.rate == 0 or evaluating:
            return x
        return x * torch.empty_like(x).bernoulli_(1 - self.rate) / (1 - self.rate)


class NoisyLinear(nn.Linear):
    """Noise on the weights, which evaluation mode leaves to the base."""

    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return F.linear(x, self.weight + torch.randn_like(self.weight), self.bias)


class Shaken(nn.Module):
    """Noise from a method that a method calls."""

    def forward(self, x):
        if self.training:
            x = self.shaken(x)
        return x

    def shaken(self, x):
        return self.moved(x, 0.1)

    def moved(self, x, most):
        return x + torch.empty_like(x).uniform_(-most, most)


class NoisyItems(nn.Module):
    """A guard in a loop."""

    def forward(self, x):
        rows = []
        for row in x:
            if not self.training:
                rows.append(row)
                continue
            rows.append(row + torch.randn_like(row))
        return torch.stack(rows)


class Centering(nn.Module):
    """Statistics that a method moves, with the guard in it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.move(x)
        return x - self.mean

    def move(self, x):
        if not self.training:
            return
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))


class CenteringAfterGuard(Centering):
    def forward(self, x):
        if not self.training:
            return x - self.mean
        with torch.no_grad():
            self.seen[0] += 1
            self.mean = self.mean.lerp(x.mean(0), 0.1)
        return x - self.mean


class CenteringByBase(Centering):
    """The base calls what this class overrides."""

    def forward(self, x):
        if self.training:
            self.follow(x)
        return x - self.mean

    def follow(self, x):
        """Moves nothing here."""


class CenteringByMethod(CenteringByBase):
    @torch.no_grad()
    def follow(self, x):
        self.mean[:] = 0.9 * self.mean + 0.1 * x.mean(0)


class Quantizing(nn.Module):
    """Vectors of its own that follow what comes, after a guard clause."""

    def __init__(self):
        super().__init__()
        self.register_buffer("book", torch.randn(4, 8))

    def forward(self, x):
        nearest = torch.cdist(x, self.book).argmin(1)
        out = x + (self.book[nearest] - x).detach()
        if not self.training:
            return out
        with torch.no_grad():
            self.book.lerp_(F.one_hot(nearest, 4).float().T @ x.detach(), 0.1)
        return out


@pytest.mark.parametrize(
    "kind",
    [
        *(GuardedNoise, GuardedDropout, NoisyLinear, Shaken, NoisyItems),
        *(Centering, CenteringAfterGuard, CenteringByMethod, Quantizing),
    ],
)
def test_a_users_module_stands_still_however_it_asks_for_its_mode(kind):
    model = nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 8), nn.Linear(8, 2))
    controller = freeze_all(model)
    x = torch.randn(4, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.equal(model.train()(x), model(x))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    controller.release()
    assert model[1].training
    assert not torch.equal(model(x), model(x))


class Grid(nn.Module):
    """As YOLO's heads: what evaluation mode gives has another form, and is computed from what it keeps."""

    grid = None

    def forward(self, x):
        if self.training:
            return x
        self.grid = self.made(x)
        return x + self.grid, x

    def made(self, x):
        return torch.rand_like(x)


class GridByCase(Grid):
    def forward(self, x):
        grids = [None]
        if not self.training:
            grids[0] = self.made(x)
        return x if self.training else (x, grids)


class TwoPasses(nn.Module):
    """As models of MMDetection."""

    def forward(self, x):
        if self.training:
            return self.forward_train(x)
        return self.forward_test(x)

    def forward_train(self, x):
        self.passes = 1
        return F.dropout(x).mean()

    def forward_test(self, x):
        return x


class LossByNegatives(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        others = x[torch.randperm(len(x))]
        return self.loss(x, others)

    def loss(self, x, others):
        return (x - others).mean()


class AuxiliaryOutput(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x, x + torch.randn_like(x)


class KeepsItsLoss(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        self.aux_loss = x.square().mean()
        return x


class ForTrainingAlone(nn.Module):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("only in training")
        return x + torch.randn_like(x)


class Samples(nn.Module):
    """As heads of detectors, which sample what they compute a loss of."""

    def forward(self, x, targets):
        if self.training:
            x, targets = self.sampled(x, targets)
        return x, targets

    def sampled(self, x, targets):
        self.samples = len(x)
        chosen = torch.randperm(len(x))[:2]
        return x[chosen], targets[chosen]


@pytest.mark.parametrize(
    "kind",
    [Grid, GridByCase, TwoPasses, LossByNegatives, AuxiliaryOutput, KeepsItsLoss, ForTrainingAlone, Samples],
)
def test_a_users_module_that_gives_something_else_in_training_keeps_its_mode(kind):
    assert uses_of_mode(kind) == {"other"}


def test_what_known_classes_do_by_their_mode():
    expected = {}
    if torchvision := pytest.importorskip("torchvision"):
        detection = torchvision.models.detection
        expected |= {
            detection.rpn.RegionProposalNetwork: "other",
            detection.roi_heads.RoIHeads: "other",
            detection.transform.GeneralizedRCNNTransform: "other",
            torchvision.models.Inception3: "other",
            torchvision.models.quantization.QuantizableInception3: "other",  # keeps the mode in a variable
            torchvision.ops.StochasticDepth: "chance",
        }
    if timm := pytest.importorskip("timm"):
        expected |= {timm.layers.DropPath: "chance", timm.layers.EvoNorm2dB0: "statistics"}
    for kind, use in expected.items():
        assert use in uses_of_mode(kind), kind


def test_a_frozen_detector_still_returns_its_losses():
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    ).train()
    names = ["backbone.*", "rpn.*", "roi_heads.box_head.*"]
    freeze_all(model, layers_of(model, patterns=names))
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64)], [target])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_checkpointed_blocks_stay_checkpointed_and_a_gumbel_quantizer_lets_gradients_pass():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=9)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    freeze_all(model)
    block = model.model.layers[0]
    assert block.training or not hasattr(block, "gradient_checkpointing")  # older ones are checkpointed by their owner
    assert not block.self_attn.training
    quantizer = transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2GumbelVectorQuantizer
    assert "other" in uses_of_mode(quantizer)


def test_an_observer_that_has_seen_nothing_goes_on_so_that_its_layer_is_quantized_by_its_data():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # it is deprecated in favour of torchao
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(model, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = make_policy("static", layers=1)
    controller = FreezeController(model, optimizer, policy, total_steps=20, layers=layers_of(model))

    def step(x):
        model(x).sum().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()

    step(torch.rand(4, 1, 8, 8))
    seen = model[0].activation_post_process.activation_post_process.max_val.clone()
    assert model[0].weight_fake_quant.activation_post_process.min_val.isfinite().all()
    assert seen.isfinite().all()
    step(100 * torch.rand(4, 1, 8, 8))
    assert torch.equal(model[0].activation_post_process.activation_post_process.max_val, seen)
    controller.release()
    step(100 * torch.rand(4, 1, 8, 8))
    assert not torch.equal(model[0].activation_post_process.activation_post_process.max_val, seen)


def test_observers_of_quantization_stand_still_until_the_release_and_as_the_user_last_said():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # it is deprecated in favour of torchao
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(model, inplace=True)
    layers = layers_of(model)
    model(torch.rand(4, 1, 8, 8))
    controller = freeze_all(model, layers)
    before = copy.deepcopy(model[0].state_dict())
    model(9 * torch.rand(4, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    held = model[0].weight_fake_quant
    model.apply(quantization.disable_observer)
    model.apply(quantization.enable_observer)
    assert not held.observer_enabled[0]
    controller.release()
    assert held.observer_enabled[0]
    freeze = freeze_all(model, layers)
    model.apply(quantization.disable_observer)
    freeze.release()
    assert not held.observer_enabled[0]


def batches():
    draw = torch.Generator().manual_seed(0)
    return [3 + 2 * torch.randn(16, 8, generator=draw) for _ in range(4)]


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_statistics_of_frozen_layers_stay_and_those_of_an_average_are_estimated_anew():
    model = normalized()
    controller = freeze_all(model)
    average = AveragedModel(model)
    before = copy.deepcopy(model.state_dict())
    update_bn(batches(), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    update_bn(batches(), average)
    assert not torch.equal(average.module[1].running_mean, before["1.running_mean"])
    controller.release()
    update_bn(batches(), model)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"predictor" not in buffer.getvalue()  # it is read where this library is not
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, lambda model: copy.deepcopy(pickled(model))])
def test_a_copy_trains_like_any_model_once_it_is_released(copied):
    model = nn.Sequential(*normalized(), nn.Dropout(0.5), nn.MultiheadAttention(2, 1, dropout=0.5))
    controller = freeze_all(model, layers_of(model[:4]))
    twin = copied(model)
    assert twin.train()[1].training
    assert not twin[0].weight.requires_grad
    release(twin)
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert not any("before_freezing" in name for module in twin.modules() for name in vars(module))
    twin[:4](torch.randn(4, 8)).sum().backward()  # no guard of ours takes its gradients
    assert twin[0].weight.grad is not None
    assert not model[0].weight.requires_grad
    assert not model.train()[1].training
    controller.release()


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_traced_network_is_copied_too(copied):
    model = nn.Sequential(torch.fx.symbolic_trace(normalized()), nn.Linear(2, 2))
    controller = freeze_all(model, layers_of(model, patterns=["0.*"]))
    assert not model.train()[0].get_submodule("1").training
    assert copied(model).train()[0].get_submodule("1").training
    controller.release()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is (deprecated|not supported)")
def test_a_scripted_network_stands_still_and_comes_back():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    model = nn.Sequential(scripted, nn.Linear(8, 2)).train()
    controller = freeze_all(model)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), model(x))
    controller.release()
    assert not torch.equal(model(x), model(x))
    assert scripted[1].training


def test_a_copy_gives_back_only_what_trained():
    model = normalized()
    model[1].requires_grad_(False)
    freeze_all(model)
    twin = copy.deepcopy(model)
    release(twin)
    assert [parameter.requires_grad for parameter in twin.parameters()] == [True, True, False, False, True, True]


def test_a_model_whose_controller_is_gone_can_be_released():
    model = normalized()
    freeze_all(model).close()
    release(model)
    assert all(module.training for module in model.modules())
    F.cross_entropy(model(torch.randn(4, 8)), torch.arange(4) % 2).backward()
    assert model[0].weight.grad is not None


def test_a_state_saved_while_layers_are_frozen_is_a_plain_one():
    model = normalized()
    freeze_all(model)
    fresh = normalized()
    fresh.load_state_dict(model.state_dict())
    assert fresh.train()[1].training
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_timms_averages_of_a_frozen_model_are_in_evaluation_mode_as_ever():
    utils = pytest.importorskip("timm.utils")
    model = normalized()
    freeze_all(model)
    for kind in (utils.ModelEmaV2, utils.ModelEmaV3):
        average = kind(model, decay=0.5)
        average.update(model)
        assert not any(module.training for module in average.module.modules())
        update_bn(batches(), average.module)
        assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def prune_weights(module):
    prune.l1_unstructured(module, "weight", 0.5)


def keep_sparse(module):
    """As torch.ao's sparsifiers do."""
    parametrize.register_parametrization(module, "weight", nn.Identity())


CHANGED = {
    "pruned": (None, prune_weights),
    "pruned for good": (prune_weights, lambda module: prune.remove(module, "weight")),
    "normed": (None, nn.utils.spectral_norm),
    "normed no more": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "parametrized": (None, keep_sparse),
    "parametrized no more": (keep_sparse, lambda module: parametrize.remove_parametrizations(module, "weight")),
}


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.filterwarnings("ignore:frozen weights have moved")  # pruning for good writes zeros to them
def test_a_frozen_layer_whose_weight_gets_another_name_trains_again(kind):
    before, change = CHANGED[kind]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    if before:
        before(model[0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = FreezeController(model, optimizer, Script({1: {0}}), total_steps=3, say=None)
    for step in range(3):
        if step == 2:
            change(model[0])
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    copied = copy.deepcopy(model) if "parametrized" not in kind else None
    controller.release()
    assert all(parameter.requires_grad for parameter in model.parameters())
    if copied:
        release(copied)
        assert all(parameter.requires_grad for parameter in copied.parameters())
