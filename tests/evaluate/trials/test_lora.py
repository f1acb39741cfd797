"""Adapters on a ResNet, EfficientNet-Lite and BERT: what trains, what stands still, and that the answer is the same."""

import pytest
import torch
from torch import nn

from collect.training.loop import train
from collect.workloads import Recipe, Workload, load_workload
from data.sources import load_source
from evaluate.trials import lora
from evaluate.trials.lora import with_lora
from predictor.errors import UsageError


class Lite(nn.Module):
    """EfficientNet-Lite0 with three channels made of one."""

    def __init__(self, classes):
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", num_classes=classes)

    def forward(self, x_BCHW):
        return self.network(x_BCHW.expand(-1, 3, -1, -1))


class Bert(nn.Module):
    """A small BERT that reads an image's rows of pixels as tokens."""

    def __init__(self, classes):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        self.network = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=classes, **sizes))

    def forward(self, x_BCHW):
        tokens_BT = (x_BCHW.flatten(1) - x_BCHW.min()).long()
        return self.network(input_ids=tokens_BT).logits


def workload(net):
    if net is None:
        return load_workload("resnet8-digits").with_recipe(epochs=1, train_samples=64)
    return Workload("own", "own", lambda source: net(source.classes), "digits", Recipe(epochs=1, train_samples=64))


HEADS = {None: "8", Lite: "network.classifier", Bert: "network.classifier"}


@pytest.fixture(scope="module", params=HEADS, ids=["resnet", "lite", "bert"])
def pair(request):
    """The plain and the adapted model, from the same random numbers; its head; two samples."""
    source = load_source("digits")
    plain = workload(request.param)
    torch.manual_seed(0)
    model = plain.model(source)
    torch.manual_seed(0)
    adapted = with_lora(plain, 4).model(source)
    return model, adapted, HEADS[request.param], source.probe(2)


def test_adapters_begin_as_the_model_was(pair):
    model, adapted, _, inputs = pair
    torch.testing.assert_close(adapted.eval()(inputs), model.eval()(inputs), rtol=1e-5, atol=1e-5)


def test_adapters_and_head_train_and_nothing_else(pair):
    model, adapted, head, _ = pair
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    start = "base_model.model.adapted_model."
    heads = {f"{start}{head}.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    assert trained >= heads
    assert all(".lora_A." in name or ".lora_B." in name for name in trained - heads)
    adapted_parts = {name.split(".lora_")[0].removeprefix(start) for name in trained - heads}
    fit = {
        name
        for name, part in model.named_modules()
        if name != head and (isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1))
    }
    assert adapted_parts == fit != set()


def test_a_step_moves_no_weight_and_no_statistic_of_the_model(pair):
    _, adapted, head, inputs = pair
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        adapted.train()
        adapted(inputs).square().sum().backward()
        optimizer.step()
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name or f"{head}.modules_to_save" in name for name in moved)
    adapted.load_state_dict(before)


def test_the_adapters_scale_is_two(pair):
    _, adapted, _, _ = pair
    from peft.tuners.lora import LoraLayer

    assert {part.scaling["default"] for part in adapted.modules() if isinstance(part, LoraLayer)} == {2.0}


def test_the_one_training_loop_trains_them():
    first, second = (train(with_lora(workload(None), 4), seed=1, device="cpu") for _ in range(2))
    assert first.status == "finished"
    assert first.curve[0]["test_loss"] == second.curve[0]["test_loss"]


def test_a_model_without_anything_to_adapt():
    def model(classes):
        return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64, 1)), nn.Conv1d(64, 2, 1), nn.Flatten(), nn.Linear(2, 3))

    with pytest.raises(UsageError, match="no linear layer and no convolution"):
        with_lora(workload(model), 4).model(load_source("digits"))


def test_without_peft_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install \.\[finetune\]"):
        with_lora(workload(None), 4)
