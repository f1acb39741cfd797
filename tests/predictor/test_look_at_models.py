"""The first look at models and in trainings of many kinds: it comes out, and leaves no trace."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from predictor import FreezeController
from predictor.freezing.wrappers import follow
from tests.conftest import ToyNet
from tests.predictor.scripted import LookingScript
from tests.predictor.twins import run_both
from tests.second_device import second_device

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 16, generator=DRAW), torch.arange(64) % 3


class Net(nn.Sequential):
    def __init__(self, *middle):
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 8), nn.Tanh(), *(middle or (nn.Linear(8, 8),)), nn.Linear(8, 3))


def batches(size=8):
    return zip(X.split(size), Y.split(size), strict=True)


def loss_of(model, scale=1.0):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1]) * scale


def start(model, answers=(0,), optimizers=None, **options):
    made = optimizers or torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_steps": 20, "say": None, **options}
    return FreezeController(model, made, LookingScript({0: answers}), **options)


def looked(model, loss=None, answers=(), given=None, **options):
    """The look, after a check that it has left no trace."""
    controller = start(model, answers, **options)
    before = copy.deepcopy(controller.model.state_dict())
    wanted = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    controller.look(given or batches(), loss or loss_of(model))
    after = controller.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert [module.training for module in model.modules()] == modes
    return controller.policy.looks[-1] if controller.policy.looks else None


def shares(look):
    return [signal / sum(look.signal_L) for signal in look.signal_L]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gradients_do_not_vanish_under_autocast(dtype):
    model = Net()
    whole = looked(model, loss_of(model, 1e-6))

    def loss(batch):
        with torch.autocast("cpu", dtype=dtype):
            return loss_of(model, 1e-6)(batch)

    half = looked(model, loss)
    assert half.mean_l1_L == pytest.approx(whole.mean_l1_L, rel=0.1)


def test_small_gradients_of_weights_in_float16_do_not_vanish():
    whole, half = Net().double(), Net().half()
    looks = [
        looked(model, loss_of(model, 1e-6), given=[(x.to(model[0].weight.dtype), y) for x, y in batches()])
        for model in (whole, half)
    ]
    assert looks[1].mean_l1_L == pytest.approx(looks[0].mean_l1_L, rel=0.1)


class Passing(torch.autograd.Function):
    """Changes nothing, and its node in the graph is of Python."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_hooks_on_gradients_see_those_of_the_training():
    """All gradients lie between -1 and 1, so that a hook that cuts there changes nothing."""
    plain = Net()
    clipped = copy.deepcopy(plain)
    for parameter in clipped.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))
    whole = looked(plain)
    assert max(whole.mean_l1_L) > 100 / 1024  # otherwise none would be cut if it was 1024 times as large
    assert looked(clipped, lambda batch: F.cross_entropy(Passing.apply(clipped(batch[0])), batch[1])) == whole


def test_half_weights_are_summed_in_full_precision():
    whole, half = Net().double(), Net().bfloat16()
    looks = [looked(model, given=[(x.to(model[0].weight.dtype), y) for x, y in batches()]) for model in (whole, half)]
    assert looks[1].mean_l1_L == pytest.approx(looks[0].mean_l1_L, rel=0.1)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(16, 8, dtype=torch.complex64), nn.Linear(8, 8, dtype=torch.complex64)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.outer(self.inner(x.to(torch.complex64))).abs())


def test_of_complex_weights_both_parts_count():
    look = looked(Complex())
    assert min(look.mean_l1_L) > 0
    assert look.size_L == (16 * 8 + 8, 8 * 8 + 8)


class Words(nn.Module):
    """An embedding, perhaps with sparse gradients or tied to the head."""

    def __init__(self, sparse=False, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer = nn.Embedding(16, 8, sparse=sparse), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens, labels=None):
        logits = self.head(self.layer(self.words(tokens)).mean(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def looked_at_sentences(model, **options):
    tokens = [torch.arange(start_, start_ + 32).reshape(8, 4) % 16 for start_ in range(0, 64, 8)]
    given = [{"tokens": each, "labels": each[:, 0]} for each in tokens]
    return looked(model, lambda batch: model(**batch)["loss"], given=given, **options)


def test_sparse_gradients_count_as_dense_ones():
    dense, sparse = Words(), Words(sparse=True)
    optimizers = torch.optim.SGD(sparse.parameters(), lr=0.1)
    assert looked_at_sentences(dense) == looked_at_sentences(sparse, optimizers=optimizers)


def test_what_is_tied_to_the_head_is_no_layer():
    model = Words(tied=True)
    assert len(looked_at_sentences(model).size_L) == 1


def test_what_the_user_holds_still_has_no_gradient():
    model = Net()
    model[0].requires_grad_(False)
    look = looked(model)
    assert look.mean_l1_L[0] == look.noise_l1_L[0] == 0
    assert look.weight_l1_L[0] > 0
    assert look.mean_l1_L[1] > 0


def test_where_no_layer_trains_there_is_no_look():
    model = Net()
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    said = []
    assert looked(model, say=said.append) is None
    assert len(said) == 1


def test_a_loss_that_hangs_on_no_layer_gives_no_look():
    model = Net()
    said = []
    assert looked(model, lambda _: model[3].weight.sum(), say=said.append) is None
    assert len(said) == 1


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.layers = nn.ModuleList([nn.Linear(16, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return self.head(x)


def test_checkpointed_layers_are_looked_at():
    model = Checkpointed(reentrant=False)
    assert min(looked(model).mean_l1_L) > 0


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_gives_no_look():
    model = Checkpointed(reentrant=True)
    said = []
    given = [(x.clone().requires_grad_(), y) for x, y in batches()]
    assert looked(model, given=given, say=said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("how", ["function", "method"])
def test_a_compiled_model_runs_eagerly_and_compiles_afterwards(how):
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    def made():
        model = Net()
        if how == "function":
            return torch.compile(model, backend=backend)
        model.compile(backend=backend)
        return model

    made()(X[:8]).sum().backward()
    compiles = len(compiled)  # never with `model.compile` of PyTorch 2.6
    torch.compiler.reset()
    compiled.clear()
    expected, called = looked(Net()), made()
    assert looked(called) == expected
    assert not compiled
    called(X[:8]).sum().backward()
    assert len(compiled) == compiles
    torch.compiler.reset()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rnn, self.head = nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(self.first(x.reshape(-1, 4, 4)))[0][:, -1])


def test_a_recurrent_network_is_looked_at():
    assert min(looked(Recurrent()).mean_l1_L) > 0
    assert torch.backends.cudnn.enabled


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.discriminator = (nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for _ in range(2))


def test_several_networks_with_optimizers_of_their_own():
    model = Gan()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.generator, model.discriminator)]
    controller = start(model, [0], optimizers)
    controller.look(batches(), lambda batch: model.discriminator(model.generator(batch[0])).square().mean())
    assert [layer.name for layer in controller.layers] == [
        *(f"generator.{index}" for index in (0, 1)),
        *(f"discriminator.{index}" for index in (0, 1)),
    ]
    assert min(controller.policy.looks[0].mean_l1_L) > 0
    # In training the first loss is of the discriminator on its own: the layers are the same.
    for part in (model.discriminator, model.generator):
        (part(X[:8]) if part is model.discriminator else model.discriminator(part(X[:8]))).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    controller.step()
    assert controller.frozen == {0}


def test_a_dry_run_looks_and_freezes_nothing():
    model = Net()
    controller = start(model, [0], dry_run=True)
    event = controller.look(batches(), loss_of(model))
    assert event.froze == (0,)
    assert controller.history == [event]
    assert controller.frozen == set()
    assert model[0].weight.requires_grad


@pytest.mark.filterwarnings("ignore")  # peft's and Transformers' own
def test_adapters_are_looked_at():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(**size, num_hidden_layers=2, num_labels=2)
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"])
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    tokens = torch.arange(128).reshape(16, 8) % 16
    look = looked(model, lambda ids: model(input_ids=ids, labels=ids[:, 0] % 2).loss, given=tokens.split(2))
    assert any(look.mean_l1_L)
    assert not all(look.mean_l1_L)  # the pretrained embeddings have no adapter


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_without_memory_and_sharded_ones_give_no_look(sharded):
    said = []
    model = Net() if sharded else Net().to("meta")
    controller = start(model, say=said.append)
    if sharded:
        model[0].weight.device_mesh = object()  # as FSDP2's have
    assert controller.look(batches(), loss_of(model)) is None
    assert (controller.looked, len(said)) == (0, 1)


def test_what_hooks_of_the_backward_pass_keep_is_taken_back():
    model, kept = Net(), []
    model[2].register_full_backward_hook(lambda module, inward, outward: kept.append(outward))
    model[0].weight.register_hook(lambda gradient: kept.append(gradient))
    assert looked(model).batches == 8
    assert kept == []


# In a process of its own


def on_the_second_device():
    """The waits of a look, the look, and what froze; and the look on the CPU."""
    looks = []
    for device in ("gpu", "cpu"):
        with second_device() as syncs:
            torch.manual_seed(0)
            model = ToyNet().to(device)
            controller = start(model)
            draw = torch.Generator().manual_seed(0)
            x, y = torch.randn(64, 1, 8, 8, generator=draw).to(device), (torch.arange(64) % 3).to(device)
            syncs.clear()
            controller.look(zip(x.split(8), y.split(8), strict=True), loss_of(model))
            waits = dict(syncs.of("predictor/"))
            looks.append((waits, controller.policy.looks[0], sorted(controller.frozen)))
    return looks


def test_on_a_second_device_it_waits_twice_at_most(on_second_device):
    (waits, ours, frozen), (_, theirs, _) = on_second_device(on_the_second_device)
    assert sum(waits.values()) <= 2, waits
    assert ours.mean_l1_L == pytest.approx(theirs.mean_l1_L, rel=1e-3)
    assert ours.noise_l2_L == pytest.approx(theirs.noise_l2_L, rel=1e-3)
    assert frozen == [0]


class Split(nn.Module):
    """Two layers on the CPU, and one on the second device."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 8), nn.Linear(8, 8).to("gpu"), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.third(self.second(self.first(x).to("gpu")).to("cpu")))


def on_two_devices():
    """The norms of a look at a model that is spread over two devices."""
    with second_device():
        torch.manual_seed(0)
        model = Split()
        controller = start(model)
        controller.look(batches(), loss_of(model))
        return controller.policy.looks[0].mean_l1_L


def test_layers_may_be_on_different_devices(on_second_device):
    norms = on_second_device(on_two_devices)
    assert len(norms) == 3
    assert min(norms) > 0


# Two processes


def two_processes(folder):
    """What two processes see that look under DDP, the second one at other batches and with another policy."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {}
    for later in (False, True):
        net = Net(nn.BatchNorm1d(8), nn.Linear(8, 8))
        ddp = DistributedDataParallel(net)
        controller = start(net if later else ddp, [0] if rank == 0 else [0, 1])
        if later:
            follow(controller, ddp)
        given = [(x, y) if rank == 0 else (-x, y) for x, y in batches()]
        before = copy.deepcopy(net.state_dict())
        state = ddp.require_backward_grad_sync, ddp.require_forward_param_sync
        controller.look(given, loss_of(ddp))
        # Of a BatchNorm that freezes, DDP sends the statistics of the first process to the other.
        measured = {name for name, _ in net.named_buffers()}
        same = all(torch.equal(before[name], t) != (name in measured) for name, t in net.state_dict().items())
        same &= state == (ddp.require_backward_grad_sync, ddp.require_forward_param_sync)
        F.cross_entropy(ddp(given[0][0]), given[0][1]).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        look = list(controller.policy.looks[0].mean_l1_L)
        known = {"look": look, "same": same, "gradients": gradients, "statistics": list(net[2].buffers())}
        seen[later] = {"frozen": sorted(controller.frozen), **known}
    torch.save(seen, folder / f"seen-{rank}.pt")
    dist.destroy_process_group()


def test_under_ddp_the_first_process_decides(tmp_path):
    run_both("tests.predictor.test_look_at_models", tmp_path)
    first, second = (torch.load(tmp_path / f"seen-{rank}.pt", weights_only=True) for rank in range(2))
    for later in (False, True):
        ours, theirs = first[later], second[later]
        assert ours["frozen"] == theirs["frozen"] == [0]
        assert ours["same"]
        assert theirs["same"]
        assert ours["look"] != theirs["look"]
        assert all(map(torch.equal, ours["gradients"], theirs["gradients"]))
        assert all(map(torch.equal, ours["statistics"], theirs["statistics"]))


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
