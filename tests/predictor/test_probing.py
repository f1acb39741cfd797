"""A probed head: fitted where that helps, left alone where it does not, and nothing else touched."""

import copy
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

from predictor import FeatureCache, FreezeController, SieveSampler, make_policy, probe_head
from predictor.errors import UsageError
from predictor.probing import regression
from tests.predictor.wrapped_loaders import Wrapped, generated
from tests.second_device import second_device

FEATURES, CLASSES = 12, 3


class Net(nn.Module):
    """A body with a norm and dropout, and a head."""

    def __init__(self, head=None, body=None):
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(4, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(FEATURES, CLASSES) if head is None else head

    def forward(self, x):
        return self.head(self.body(x))


def net(**parts):
    torch.manual_seed(1)
    return Net(**parts)


def samples(count=300, seed=0):
    """Four numbers a sample; its class is the quadrant of the first two, with two quadrants in one."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def batches(x, *rest, size=50):
    return list(zip(x.split(size), *(each.split(size) for each in rest), strict=True))


def accuracy(model, x, y):
    with torch.no_grad():
        return (copy.deepcopy(model).eval()(x).argmax(dim=1) == y).float().mean().item()


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def test_the_head_is_fitted_and_nothing_else_changes():
    model = net()
    model.body[0].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    report = probe_head(model, batches(*samples()))
    assert report.probed, report.reason
    assert (report.head, report.samples, report.passed, report.reason) == ("head", 300, 350, "")
    assert report.loss < 0.9 * report.loss_before
    assert report.fit_flops > 0
    after = model.state_dict()
    assert not torch.equal(after.pop("head.weight"), state["head.weight"])
    assert not torch.equal(after.pop("head.bias"), state["head.bias"])
    assert same(after, state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    # What is reported of samples that were held out holds for new ones.
    assert accuracy(model, *samples(2000, seed=7)) > report.accuracy - 0.1


def test_the_fit_is_the_minimum_of_its_loss():
    """At the minimum, the mean gradient of the cross entropy is minus the penalty times the weights."""
    _, y = samples()
    fit_x = torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(3))
    fit = regression.Regression(fit_x, y[:200], CLASSES, bias=True)
    fit.fit(0.01)
    weight = fit._weight_CF.detach()
    logits = nn.functional.linear(fit._x_NF, weight, fit._bias_C.detach())
    error = logits.softmax(dim=1) - nn.functional.one_hot(y[:200], CLASSES)
    assert torch.allclose(error.T @ fit._x_NF / 200, -0.01 * weight, atol=1e-4)
    assert error.mean(dim=0).abs().max() < 1e-4
    # On the features as they are, the head's weights give the same logits.
    point = fit.point(0.01, (fit_x, y[:200]))
    assert point.losses_H.mean().item() == pytest.approx(point.train_loss, abs=1e-5)


def test_a_fifth_of_each_class_is_held_out():
    held = regression.held_out(torch.tensor([0] * 10 + [1] * 15 + [2] * 2))
    assert held.nonzero().flatten().tolist() == [2, 7, 12, 17, 22]


def test_the_same_samples_give_the_same_head():
    one, two = net(), net()
    assert probe_head(one, batches(*samples())).loss == probe_head(two, batches(*samples())).loss
    assert same(one.state_dict(), two.state_dict())


def test_a_head_without_bias():
    model = net(head=nn.Linear(FEATURES, CLASSES, bias=False))
    assert probe_head(model, batches(*samples())).probed


class Upcast(nn.Linear):
    """Computes in float32 whatever it is given, as some adapters' layers do."""

    def forward(self, x):
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class InHalf(nn.Module):
    """A head of half precision in a model of single precision."""

    def __init__(self):
        super().__init__()
        self.linear = Upcast(FEATURES, CLASSES).bfloat16()

    def forward(self, x):
        return self.linear(x.bfloat16()).float()


class UnderItsOwnAutocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def observed():
    """A head with hooks that change nothing, or no more than its input."""
    model = Net()
    model.head.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model.head.register_forward_hook(lambda module, args, output: output.register_hook(print) and None)
    return model


@pytest.mark.parametrize("make", [UnderItsOwnAutocast, lambda: Net(head=InHalf()), observed])
def test_what_is_reported_is_what_the_model_has(make):
    torch.manual_seed(1)
    model, (x, y) = make(), samples()
    report = probe_head(model, batches(x, y))
    assert report.probed, report.reason
    loss = nn.functional.cross_entropy(copy.deepcopy(model).eval()(x), y).item()
    # Bfloat16 has 8 bits, and logits are of the order of 1.
    assert loss == pytest.approx((4 * report.train_loss + report.loss) / 5, abs=2**-5)


def test_under_autocast():
    model = net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = probe_head(model, batches(*samples()))
    assert report.probed
    assert model.head.weight.dtype == torch.float32
    assert accuracy(model, *samples()) > 0.6


def probed_on(device):
    """The head of a model on a device whose loader gives samples of the CPU's."""
    with second_device():
        model = net().to(device)
        report = probe_head(model, batches(*samples()))
        return report.probed, [parameter.detach().cpu() for parameter in model.head.parameters()]


def test_on_another_device(on_second_device):
    probed, parameters = on_second_device(probed_on, "gpu")
    assert probed
    for here, there in zip(on_second_device(probed_on, "cpu")[1], parameters, strict=True):
        assert torch.allclose(here, there, atol=1e-4)


def test_a_model_that_classifies_each_token_and_picks_one():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.score = nn.Embedding(20, FEATURES), nn.Linear(FEATURES, CLASSES)
            nn.init.zeros_(self.score.weight)  # so that all tokens have the same logits
            nn.init.zeros_(self.score.bias)

        def forward(self, tokens, last):
            return {"logits": self.score(self.embed(tokens))[torch.arange(len(tokens)), last]}

    draw = torch.Generator().manual_seed(0)
    tokens, last = (torch.randint(high, (300, *shape), generator=draw) for high, shape in ((20, (5,)), (5, ())))
    y = tokens[torch.arange(300), last] % CLASSES
    torch.manual_seed(0)
    model = Tokens()
    report = probe_head(model, batches(tokens, last, y))
    assert report.probed, report.reason
    assert report.accuracy > 0.9


def test_dict_batches_of_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=CLASSES, **small)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(20, (200, 4))
    loader = [
        UserDict(input_ids=some, attention_mask=torch.ones_like(some), labels=some[:, 0] % CLASSES)
        for some in tokens.split(50)
    ]
    report = probe_head(model, loader)
    assert (report.head, report.samples, report.passed) == ("classifier", 200, 250)
    assert report.loss == report.loss  # there was a fit


def test_a_classifier_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=2)
    y = torch.arange(60) % 2
    x = torch.rand(60, 3, 32, 32) * (1 + y.view(-1, 1, 1, 1))
    report = probe_head(model, batches(x, y, size=20))
    assert report.head == "classifier"
    assert report.loss == report.loss


def test_the_pass_ends_after_enough_samples():
    report = probe_head(net(), batches(*samples()), samples=120)
    assert report.samples == 150  # whole batches


def test_the_loaders_own_generator_stands_where_it_stood():
    generator = torch.Generator().manual_seed(4)
    data = torch.utils.data.TensorDataset(*samples())
    loader = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True, generator=generator)
    state = generator.get_state()
    assert probe_head(net(), loader).probed
    assert torch.equal(generator.get_state(), state)


class Noisy(torch.utils.data.Dataset):
    """Numbered samples with noise from a generator of its own."""

    def __init__(self):
        (self.x, self.y), self.random = samples(), np.random.RandomState(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return index, self.x[index] + float(self.random.rand()), self.y[index]


LOADERS = {
    "its generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(4)},
    "a sampler that counts": lambda: {"sampler": SieveSampler(300)},
    "workers that stay": lambda: {"shuffle": True, "num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("wrap", [lambda loader: loader, Wrapped, generated])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_training_gets_the_samples_that_it_would_have_got(kind, wrap):
    given = []
    for probes in (False, True):
        model = net()
        torch.manual_seed(2)
        loader = torch.utils.data.DataLoader(Noisy(), batch_size=50, **LOADERS[kind]())
        if probes:
            probe_head(model, wrap(loader), unpack=lambda batch: (batch[1], batch[2]), samples=120)
        given.append([(ids.tolist(), x.tolist()) for _ in range(2) for ids, x, _ in loader])
    assert given[0] == given[1]


def test_what_unpack_keeps_is_taken_back():
    seen = []
    probe_head(net(), batches(*samples()), unpack=lambda batch: seen.append(1) or batch)
    assert not seen


def test_a_pass_that_ends_early_leaves_the_batch_it_is_in():
    inside = []

    def loader():
        for batch in batches(*samples()):
            inside.append(True)
            try:
                yield batch
            finally:
                inside.pop()

    given = loader()
    probe_head(net(), given, samples=100)
    assert not inside


def test_the_head_can_be_named():
    class Two(Net):
        def forward(self, x):
            features = self.body(x)
            return self.head(features), self.other(features)

    model = net()
    model.__class__ = Two
    model.other = nn.Linear(FEATURES, CLASSES)
    assert probe_head(copy.deepcopy(model), batches(*samples())).head == "other"
    assert probe_head(model, batches(*samples()), head="head").head == "head"


def test_unpack_makes_inputs_and_labels():
    x, y = samples()
    loader = [{"x": a, "y": b} for a, b in batches(x, y)]
    assert probe_head(net(), loader, unpack=lambda batch: (batch["x"], batch["y"])).probed


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(FEATURES, CLASSES)
        self.again.weight = self.head.weight


class Halved(Net):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Twice(Net):
    def forward(self, x):
        features = self.body(x)
        return self.head(features) + self.head(-features)


class Cosine(nn.Linear):
    def forward(self, x):
        return 4 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


class Behind(nn.Module):
    """A linear layer, and what is done to its output."""

    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(FEATURES, CLASSES), change

    def forward(self, x):
        return self.change(self.linear(x))


def behind(change):
    return lambda: Net(head=Behind(change))


def hooked(zeros=False):
    """A head whose hook makes all logits smaller. Of zeros that cannot be seen."""
    model = Net()
    model.head.register_forward_hook(lambda module, args, output: 0.1 * output)
    if zeros:
        nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)
    return model


def bias_held_still():
    model = Net()
    model.head.bias.requires_grad_(False)
    return model


def one_hot(y):
    return nn.functional.one_hot(y, CLASSES)


UNFIT = {
    "labels that are numbers": (Net, lambda y: y.float()),
    "several labels": (Net, one_hot),
    "soft labels": (Net, lambda y: one_hot(y).float()),
    "a class too many": (Net, lambda y: y + 1),
    "an ignored label": (Net, lambda y: y - 1),
    "a class without samples": (Net, lambda y: y.clamp(max=1)),
    "labels that mean nothing": (Net, lambda y: y[torch.randperm(len(y), generator=torch.Generator().manual_seed(2))]),
    "another output than the head's": (Halved, None),
    "a head that runs twice": (Twice, None),
    "softmax behind it": (lambda: Net(head=nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Softmax(dim=1))), None),
    "a convolution for a head": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, CLASSES, 1), nn.Flatten()),
        None,
    ),
    "a head that the user holds still": (Frozen, None),
    "a tied head": (Tied, None),
    "a parametrized head": (lambda: Net(head=parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES))), None),
    "a pruned head": (lambda: Net(head=prune.l1_unstructured(nn.Linear(FEATURES, CLASSES), "weight", 0.5)), None),
    "a bias that the user holds still": (bias_held_still, None),
    "a hook on the head": (hooked, None),
    "a hook on a head of zeros": (lambda: hooked(zeros=True), None),
    "a head with a forward of its own": (lambda: Net(head=Cosine(FEATURES, CLASSES)), None),
    "classes in another order": (behind(lambda logits: logits.flip(-1)), None),
    "classes that change places": (behind(lambda logits: logits[:, [0, 2, 1]]), None),
    "negative logits cut off": (behind(torch.relu), None),
    "logits of at least their mean": (behind(lambda logits: torch.maximum(logits, logits.mean(1, True))), None),
    "nearly no samples": (Net, lambda y: y),
    "one output": (lambda: Net(head=nn.Linear(FEATURES, 1)), lambda y: 0 * y),
    "features that are not finite": (lambda: Net(body=nn.Sequential(nn.Linear(4, FEATURES), Infinite())), None),
}


class Infinite(nn.Module):
    def forward(self, x):
        return x / 0


@pytest.mark.parametrize("what", UNFIT)
def test_it_abstains(what):
    make, relabel = UNFIT[what]
    torch.manual_seed(1)
    model, (x, y) = make(), samples(20 if "nearly" in what else 300)
    state = copy.deepcopy(model.state_dict())
    report = probe_head(model, batches(x, y if relabel is None else relabel(y)))
    assert not report.probed
    assert report.reason
    assert same(model.state_dict(), state)


def test_a_head_that_knows_as_much_is_left_alone():
    model = net()
    assert probe_head(model, batches(*samples())).probed
    state = copy.deepcopy(model.state_dict())
    again = probe_head(model, batches(*samples()))
    assert not again.probed
    assert same(model.state_dict(), state)


def test_few_samples_of_many_features_are_not_learnt_by_heart():
    """Sixty samples with 400 features of noise can be told apart without a fault, and nothing follows for others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 400), nn.Linear(400, CLASSES))
    with torch.no_grad():
        model[0].weight.zero_()
    x, y = samples(60)
    noise = torch.randn(60, 400, generator=torch.Generator().manual_seed(5))
    model[0].register_forward_hook(lambda module, args, out: out + noise[: len(out)] * 5)
    report = probe_head(model, batches(x, y, size=60))
    assert not report.probed
    assert report.train_accuracy < 1


def test_wrong_use_is_named():
    loader = batches(*samples())
    with pytest.raises(UsageError, match="samples=0"):
        probe_head(net(), loader, samples=0)
    with torch.inference_mode(), pytest.raises(UsageError, match=r"inference mode.*outside"):
        probe_head(net(), loader)
    with pytest.raises(UsageError, match="head='tail'"):
        probe_head(net(), loader, head="tail")
    with pytest.raises(UsageError, match=r"head='body\.1'"):
        probe_head(net(), loader, head="body.1")
    with pytest.raises(UsageError, match="no batch"):
        probe_head(net(), [])
    with pytest.raises(UsageError, match="unpack="):
        probe_head(net(), [samples()[0]])
    with pytest.raises(UsageError, match="a dict of x, y"):
        probe_head(net(), [{"x": 1, "y": 2}])
    with pytest.raises(UsageError, match=r"Net cannot be called.*unpack="):
        probe_head(net(), [(x, x, y) for x, y in loader])


def test_the_pass_fills_the_cache_of_a_frozen_prefix():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = samples()
    loader = batches(torch.arange(len(x)), x, y)
    controller = FreezeController(model, optimizer, make_policy("static", layers=1), total_steps=6, say=None)
    cache = FeatureCache(controller)

    def inside():
        for ids, *batch in loader:
            with cache.batch(ids):
                yield batch

    plain = copy.deepcopy(model)
    assert probe_head(model, inside()).probed
    probe_head(plain, batches(x, y))
    assert same(model.state_dict(), plain.state_dict())
    assert (cache.hits, cache.misses, cache.reason) == (0, 6, "")
    for ids, x_B, y_B in loader:
        with cache.batch(ids):
            logits = model(x_B)
        assert torch.allclose(logits, plain(x_B), atol=1e-6)
        nn.functional.cross_entropy(logits, y_B).backward()
        optimizer.zero_grad()
    assert cache.hits == 6


def test_with_ddp_all_take_what_the_first_process_found(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        one, two = net(), net()
        report = probe_head(DistributedDataParallel(one), batches(*samples()))
        assert report.probed
        others = (report, tuple(parameter.detach().clone() for parameter in one.head.parameters()))

        def broadcast(found, source, group):
            found[0] = others

        monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
        # Its own samples would have it abstain.
        x, y = samples(seed=4)
        wrapped = torch.compile(DistributedDataParallel(two), backend="eager")
        assert probe_head(wrapped, batches(x, y.clamp(max=1))).probed
        assert same(one.state_dict(), two.state_dict())
    finally:
        dist.destroy_process_group()
