"""Layers of Transformers' models, made from small configurations: tied embeddings, heads, poolers, shared layers."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from predictor.layers.flops import count_flops
from predictor.layers.layer import layers_of
from tests.predictor.frozen_prefixes import check_ends, check_order, flops, freeze_all, inside, left_out

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
IMAGES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 2]])}
BOTH = TEXT | {"decoder_input_ids": torch.tensor([[3, 4, 5, 2]])}
IMAGE = {"pixel_values": torch.rand(1, 3, 32, 32)}

HEADED = {  # class: (configuration's class, its settings, example, names of the head's modules)
    "AlbertForSequenceClassification": ("AlbertConfig", SMALL, TEXT, ["classifier"]),
    "BartForSequenceClassification": (
        "BartConfig",
        {"vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "eos_token_id": 2}
        | {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("attention_heads", "ffn_dim")},
        TEXT,
        ["classification_head"],
    ),
    "BertForSequenceClassification": ("BertConfig", SMALL, TEXT, ["classifier"]),
    "BertModel": ("BertConfig", SMALL, TEXT, ["pooler"]),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
        TEXT,
        ["pre_classifier", "classifier"],
    ),
    "GPT2ForSequenceClassification": ("GPT2Config", SMALL | GPT2, TEXT, ["score"]),
    "LlamaForCausalLM": ("LlamaConfig", SMALL | {"tie_word_embeddings": False}, TEXT, ["lm_head"]),
    "MixtralForCausalLM": (
        "MixtralConfig",
        SMALL | {"num_key_value_heads": 2, "num_local_experts": 2, "tie_word_embeddings": False},
        TEXT,
        ["lm_head"],
    ),
    "RobertaForSequenceClassification": ("RobertaConfig", SMALL | {"pad_token_id": 1}, TEXT, ["classifier"]),
    "T5ForSequenceClassification": (
        "T5Config",
        T5 | {"eos_token_id": 2, "decoder_start_token_id": 0},
        TEXT,
        ["classification_head"],
    ),
    "ViTForImageClassification": ("ViTConfig", IMAGES | {"image_size": 32, "patch_size": 8}, IMAGE, ["classifier"]),
}
TIED = {  # the same; the word embedding is the head
    "BertForMaskedLM": ("BertConfig", SMALL, TEXT, ["bert.embeddings.word_embeddings", "cls"]),
    "GPT2LMHeadModel": ("GPT2Config", SMALL | GPT2, TEXT, ["transformer.wte"]),
    "LlamaForCausalLM": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}, TEXT, ["model.embed_tokens"]),
    "T5ForConditionalGeneration": ("T5Config", T5, BOTH, ["shared"]),
}


def made(table, name):
    config, settings, example, head = table[name]
    return getattr(transformers, name)(getattr(transformers, config)(**settings)), example, head


def test_blocks_are_the_models_own():
    model, example, _ = made(HEADED, "BertForSequenceClassification")
    names = [layer.name for layer in layers_of(model, example, granularity="block")]
    assert names == ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "bert.pooler"]
    model, example, _ = made(HEADED, "T5ForSequenceClassification")
    names = [layer.name.removeprefix("transformer.") for layer in layers_of(model, example, granularity="block")]
    assert names[1:] == [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)]


@pytest.mark.parametrize("name", HEADED)
def test_a_model_with_a_head(name):
    model, example, head = made(HEADED, name)
    layers, blocks = layers_of(model, example), layers_of(model, example, granularity="block")
    assert left_out(model, layers) == left_out(model, blocks) == inside(model, *head)
    assert 3 < len(blocks) < len(layers)
    check_order(model, example, layers, blocks)
    check_ends(model, example, [blocks[:2], layers[: len(layers) * 7 // 8]])


@pytest.mark.parametrize("name", TIED)
def test_a_model_with_a_tied_head_never_freezes_its_embedding(name):
    model, example, head = made(TIED, name)
    layers, blocks = layers_of(model, example), layers_of(model, example, granularity="block")
    assert left_out(model, layers) == left_out(model, blocks) == inside(model, *head)
    check_order(model, example, layers, blocks)
    # The backward pass has to reach the embedding: what freezing saves here is the gradients of the weights.
    full, half, none = (cost(model, example, blocks[:count]) for count in (0, len(blocks) // 2, len(blocks)))
    assert none < half < full
    assert none > 0.4 * full


def cost(model, example, prefix):
    freeze_all(prefix)
    return flops(model, example, lambda output: output.logits.sum())[2]


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2ForSequenceClassification", "LlamaForCausalLM"])
def test_a_step_costs_the_forward_pass_and_the_backward_of_what_is_behind_the_prefix(name, granularity):
    model, example, _ = made(HEADED, name)
    layers = layers_of(model, example, granularity=granularity)
    least = None
    for count in (0, len(layers) // 2, len(layers)):
        freeze_all(layers[:count])
        _, rest, backward = flops(model, example, lambda output: output.logits.sum())
        # Fused attention computes its scores a second time: two and a half times its forward pass.
        assert backward <= 2.5 * rest
        assert least is None or backward < least
        least = backward


@pytest.mark.parametrize("name", HEADED)
def test_a_model_runs_on_an_example_of_its_own(name):
    model, example, _ = made(HEADED, name)
    assert [layer.name for layer in layers_of(model)] == [layer.name for layer in layers_of(model, example)]


def test_what_transformers_computes_once_more_is_counted():
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **size, num_key_value_heads=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the call has another name in newer versions
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.arange(12).reshape(2, 6)
    counted = count_flops(model.train(), layers_of(model), (tokens,), {"use_cache": False}).step(frozenset())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
