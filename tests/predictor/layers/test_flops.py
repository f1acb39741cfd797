"""What layers cost: counted in one forward pass, against what PyTorch counts in whole steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from predictor.freezing.freeze import freeze
from predictor.layers.flops import LayerFlops, count_flops
from predictor.layers.layer import layers_of

X = torch.linspace(-1, 1, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


class Encoder(nn.Module):
    """Embeds rows of an image, attends, and classifies."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(48, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        tokens = x.permute(0, 2, 1, 3).flatten(2)
        return self.head(self.body(self.embed(tokens)).mean(1))


def counted_step(model, layers, frozen):
    for index in frozen:
        freeze(layers[index])
    torch.backends.mha.set_fastpath_enabled(False)  # its operators are unknown to the counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(X), torch.tensor([0, 1, 2, 3])).backward()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (0, 1, 2), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("make", [chain, Encoder])
def test_a_step_costs_what_pytorch_counts_in_it(make, frozen):
    layers = layers_of(model := make(), X)
    flops = count_flops(model, layers, (X,), {})
    assert flops.step(frozenset(frozen)) == counted_step(model, layers, frozen)


def test_a_case_worked_out_by_hand():
    flops = LayerFlops(forward_L=(10, 20, 40), weightless_L=(0, 5, 0), entry_L=(10, 8, 40), head=7)
    # Forward 77; weights 10 + 15 + 40 + 7; inputs 15 + 40 + 7 of products with weights, 2 x 5 of those without.
    assert flops.step(frozenset()) == 77 + 72 + 62 + 10
    # The second layer trains first: inputs inside it, of 15 - 8 and 2 x 5, and all behind it.
    assert flops.step(frozenset({0})) == 77 + 62 + 54 + 10
    assert flops.step(frozenset({0, 1})) == 77 + 47 + 7
    assert flops.step(frozenset({0, 1, 2})) == 77 + 7
    assert flops.step(frozenset({0, 1, 2}), cached=True) == 7 + 7
    assert flops.step(frozenset({0, 2}), cached=True) == 67 + 22 + 54 + 10
    assert flops.share(frozenset({0, 1, 2})) == 84 / 221


def test_a_grouped_convolution_costs_as_much_backwards_as_forwards():
    """PyTorch's own counter takes a weight gradient of a depthwise convolution for that of a full one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    flops = count_flops(model, layers_of(model, X), (X,), {})
    depthwise = 2 * 4 * 8 * 14 * 14 * 9
    assert flops.forward_L == (2 * 4 * 8 * 16 * 16 * 3, depthwise)
    assert flops.step(frozenset()) - flops.step(frozenset({1})) == depthwise


def test_counting_leaves_the_model_as_it_was():
    model = chain().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    count_flops(model, layers_of(model, X), (X,), {})
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Tied(nn.Module):
    """The embedding is the head as well, so that a backward pass never ends early."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, tokens):
        return F.linear(self.body(self.embed(tokens)), self.embed.weight)


class Taught(nn.Module):
    """A network beside a teacher, which costs a forward pass alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.teacher = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))) for _ in range(2))
        self.teacher.requires_grad_(False)

    def forward(self, x):
        return self.net(x) - self.teacher(x)


class TaughtLast(Taught):
    """Its teacher runs behind the network, so that its layers are behind those that train."""

    def forward(self, x):
        ours = self.net(x)
        return ours - self.teacher(x)


class Checkpointed(nn.Module):
    """Blocks that the backward pass computes once more, but for the last product in each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class CheckpointedInTraining(Checkpointed):
    """As Transformers has it: a flag, which counts in training mode alone."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = True

    def forward(self, x):
        on = self.gradient_checkpointing and self.training
        return super().forward(x) if on else self.head(nn.Sequential(*self.blocks)(x))


class OnlyBiases(nn.Module):
    """Biases alone train, as in BitFit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), nn.Linear(8, 2)
        for layer in self.body:
            layer.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x))


class Auxiliary(nn.Module):
    """A second head, in training alone; in evaluation more inputs, as test-time augmentation has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.aside, self.head = nn.Linear(8, 30), nn.Linear(8, 2)

    def forward(self, x):
        features = self.body(x if self.training else torch.cat([x, -x]))
        return torch.cat([self.head(features), self.aside(features)], 1) if self.training else self.head(features)


FLOWS = {
    "tied": (Tied, torch.arange(5)),
    "taught": (Taught, torch.ones(2, 8)),
    "taught last": (TaughtLast, torch.ones(2, 8)),
    "input": (chain, X),
    "checkpointed": (Checkpointed, torch.ones(2, 8)),
    "checkpointed in training": (CheckpointedInTraining, torch.ones(2, 8)),
    "biases": (OnlyBiases, torch.ones(2, 8)),
    "a head in training": (Auxiliary, torch.ones(2, 8)),
}


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("case", FLOWS)
def test_a_step_costs_what_its_gradients_flow_through(case, count):
    make, x = FLOWS[case]
    model, x = make(), x.clone().requires_grad_() if case == "input" else x
    layers, trained = layers_of(model, x), {id(p) for p in model.parameters() if p.requires_grad}
    layers = tuple(layer for layer in layers if case != "taught" or not layer.name.startswith("teacher"))
    flops = count_flops(model, layers, (x,), {}, trained)
    for layer in layers[:count]:
        freeze(layer)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert flops.step(frozenset(range(min(count, len(layers))))) == counter.get_total_flops()


class Dropping(nn.Module):
    """Leaves all blocks out at random, or refuses to train without gradients."""

    def __init__(self, refuses):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2)
        self.refuses = refuses

    def forward(self, x):
        if self.refuses and self.training and not torch.is_grad_enabled():
            raise RuntimeError("not without gradients")
        for block in self.blocks:
            x = x if self.training and torch.rand(()) < 1 else block(x)
        return self.head(x)


@pytest.mark.parametrize("refuses", [False, True])
def test_layers_that_a_training_leaves_out_at_random_count_all_the_same(refuses):
    model, x = Dropping(refuses), torch.ones(2, 8)
    layers = layers_of(model, x)
    flops = count_flops(model, layers, (x,), {})
    assert flops == count_flops(model.eval(), layers, (x,), {})
    assert flops.forward_L == (2 * 2 * 8 * 8,) * 3


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(5, 2)
        self.net = kind(8, 5, batch_first=True, **options)

    def forward(self, x):
        return self.head(self.net(self.embed(x))[0][..., :5])


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_a_recurrent_layer_costs_its_products_also_where_one_operator_computes_it(kind, options, count):
    model, x = Recurrent(kind, **options), torch.ones(3, 7, 6)
    layers = layers_of(model, x)
    flops = count_flops(model, layers, (x,), {})
    products = sum(2 * 3 * 7 * weight.numel() for weight in model.net.parameters() if weight.dim() == 2)
    assert flops.forward_L == (2 * 3 * 7 * 6 * 8, products)
    with torch.backends.mkldnn.flags(enabled=False):  # computed one by one
        assert count_flops(model, layers, (x,), {}) == flops
        for layer in layers[:count]:
            freeze(layer)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
    # The state before the first step is a constant, and the other direction has an entry of its own.
    spared = 2 * 3 * 5 * sum(len(w) for name, w in model.net.named_parameters() if "weight_hh" in name)
    spared += 2 * 3 * 7 * 8 * len(model.net.weight_ih_l0) if options.get("bidirectional") else 0
    assert 0 <= flops.step(frozenset(range(count))) - counter.get_total_flops() <= spared


class OnGpu(nn.Module):
    """Calls what a GPU computes a recurrent layer with, on tensors without memory."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, nn.Linear(5, 2, device="meta")

    def forward(self, x):
        state, weights = x.new_empty(2, len(x), 5), [*self.net.parameters()]
        options = (False, 0.0, True, False, [], None)
        return self.head(torch._cudnn_rnn(x, weights, 4, None, state, state, 2, 5, 0, 2, *options)[0])


def test_so_it_does_on_a_gpu():
    net = nn.LSTM(8, 5, num_layers=2, device="meta")
    model, x = OnGpu(net), torch.empty(7, 3, 8, device="meta")
    flops = count_flops(model, layers_of(model, patterns=["net"]), (x,), {})
    products = [2 * 3 * 7 * weight.numel() for weight in net.parameters() if weight.dim() == 2]
    assert flops.forward_L == (sum(products),)
    assert flops.entry_L == (products[0],)


class Attention(nn.Module):
    """Attention without fusion, whose scores take 16 GB for the inputs below. It keeps what it saw last."""

    def __init__(self, reads):
        super().__init__()
        self.query, self.head, self.reads, self.kept = nn.Linear(4, 4), nn.Linear(4, 2), reads, None

    def forward(self, x):
        if self.reads and x.sum() > 1e9:
            raise RuntimeError("too large")
        self.kept = query = self.query(x)
        return self.head((query @ query.transpose(1, 2)).softmax(-1) @ x)


@pytest.mark.parametrize(("reads", "samples"), [(False, 64), (True, 2)])
def test_large_results_are_not_computed(reads, samples):
    model, x = Attention(reads), torch.zeros(2048, 512, 4) if reads else torch.zeros(64, 8192, 4)
    layers = layers_of(model, x[:1, :4])
    flops = count_flops(model, layers, (x,), {})
    length = x.shape[1]
    assert flops.weightless_L == (2 * 2 * samples * length * length * 4,)
    assert model.kept is None


def test_what_is_too_large_for_two_samples_is_not_counted():
    model, x = Attention(reads=True), torch.zeros(2, 16384, 4)
    layers = layers_of(model, x[:1, :4])
    with pytest.raises(MemoryError):
        count_flops(model, layers, (x,), {})
