"""Models with peft's adapters: a layer with adapters is one layer, in the order of the forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from predictor.controller import FreezeController
from predictor.freezing.freeze import freeze
from predictor.layers.flops import count_flops
from predictor.layers.layer import layers_of
from predictor.policies import make_policy

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and Transformers' own

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
TOKENS = torch.arange(1, 13).reshape(2, 6)


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options))


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def lora(model, kind="CAUSAL_LM", **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=kind, **options))


MADE = {
    "lora": lambda: lora(llama(), target_modules=["q_proj", "v_proj"]),
    "dora": lambda: lora(llama(), target_modules="all-linear", use_dora=True),
    "embedding": lambda: lora(llama(), target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]),
    "classifier": lambda: lora(bert(), "SEQ_CLS", target_modules=["query", "value"]),
    "ia3": lambda: peft.get_peft_model(
        llama(),
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "vera": lambda: peft.get_peft_model(
        llama(), peft.VeraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    ),
    "encoder of prompts": lambda: peft.get_peft_model(
        bert(), peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ),
}


def held_by(layers):
    return {id(parameter) for layer in layers for parameter in layer.parameters()}


@pytest.mark.parametrize("name", MADE)
def test_adapters_are_in_layers_and_something_trains_on(name):
    model = MADE[name]()
    inside = held_by(layers_of(model))
    trained = {n: id(p) for n, p in model.named_parameters() if p.requires_grad}
    assert inside.intersection(trained.values())
    assert not inside.issuperset(trained.values())
    assert not [n for n, p in model.named_parameters() if id(p) in inside and ("lm_head" in n or "classifier" in n)]


def test_a_layer_with_adapters_is_one_layer_where_it_computes():
    model = lora(bert(), "SEQ_CLS", target_modules=["query"])
    names = [layer.name.rpartition(".")[2] for layer in layers_of(model)]
    assert names[3:7] == ["query+lora_A+lora_B", "key", "value", "dense"]
    assert [layer.name for layer in layers_of(model.get_base_model())][3].endswith("query+lora_A+lora_B")
    blocks = [layer.name.rpartition("bert.")[2] for layer in layers_of(model, granularity="block")]
    assert blocks == ["embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"]


def test_the_last_adapters_train_on_where_the_head_has_none():
    model = lora(llama(), target_modules=["q_proj"])
    left = {n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held_by(layers_of(model))}
    assert len(left) == 2
    assert all(".layers.1.self_attn.q_proj.lora_" in name for name in left)


def test_adapters_can_be_switched_merged_and_taken_off():
    model = lora(llama(), target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert [layer.name.rpartition(".")[2] for layer in layers_of(model)][1:4] == [
        "q_proj+lora_A+lora_B",
        "k_proj",
        "v_proj+lora_A+lora_B",
    ]
    assert "lora" not in " ".join(layer.name for layer in layers_of(model.merge_and_unload()))


@pytest.mark.parametrize("name", ["lora", "classifier"])
def test_a_training_freezes_adapters_to_the_last_but_one(name):
    model = MADE[name]().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    said = []
    policy = make_policy("linear", start=0.0, end=1.0)
    controller = FreezeController(model, optimizer, policy, total_steps=4, say=said.append)
    moved = False
    for _ in range(4):
        frozen = [p for index in controller.frozen for p in controller.layers[index].parameters()]
        before = [parameter.detach().clone() for parameter in frozen]
        model(input_ids=TOKENS).logits.square().mean().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        moved |= not all(map(torch.equal, frozen, before))
    assert not moved
    assert len(controller.frozen) == len(controller.layers)
    assert said


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("count", [0, 4, 9, 99])
def test_a_step_costs_what_pytorch_counts_in_it(count, inputs):
    model = lora(llama(), target_modules="all-linear").train()
    if inputs:
        model.enable_input_require_grads()
    layers, trained = layers_of(model), {id(p) for p in model.parameters() if p.requires_grad}
    flops = count_flops(model, layers, (), {"input_ids": TOKENS}, trained)
    for layer in layers[:count]:
        freeze(layer)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=TOKENS).logits.sum().backward()
    step = flops.step(frozenset(range(min(count, len(layers)))))
    assert step == pytest.approx(counter.get_total_flops(), rel=0 if inputs else 0.05)
