"""What models of timm and Transformers, with adapters or without, declare about themselves: inputs, and their head."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 8
_SMALL = 64
"""Height and width of a convolutional network's example image, whatever the network is made for."""


def example_inputs(model: nn.Module) -> Iterator[object]:
    """Inputs that a model of timm or Transformers accepts according to its configuration, the cheapest first.

    Nothing for other models, and nothing for sharded models, which all processes would have to run.
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if first is None or type(first.data) is not Tensor:
        return
    model = without_adapters(model)
    if _comes_from(model, "timm"):
        for shape in _image_shapes(model):
            yield torch.zeros(1, *shape, dtype=first.dtype, device=first.device)
    elif _comes_from(model, "transformers") and hasattr(model, "config"):
        yield from _transformers_inputs(model, first)


def declared_heads(model: Any) -> list[nn.Module]:
    """Modules that the model itself declares as its head. Empty where it declares none."""
    model = without_adapters(model)
    if _comes_from(model, "timm") and hasattr(model, "get_classifier"):
        return list(_modules_in(model.get_classifier()))
    if not _comes_from(model, "transformers"):
        return []
    heads = list(_modules_in(model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None))
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if isinstance(base, nn.Module):
        heads += [child for child in model.children() if child is not base]
    return heads


def without_adapters(model: Any) -> Any:
    """The model inside peft's, whose layers are those with adapters; any other model itself."""
    return model.get_base_model() if _comes_from(model, "peft") and hasattr(model, "get_base_model") else model


def _comes_from(model: nn.Module, package: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(model).__mro__)


def _modules_in(value: object) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _modules_in(part)


def _image_shapes(model: Any) -> Iterator[tuple[int, ...]]:
    card: dict[str, Any] = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, *size = card.get("input_size", (3, 224, 224))
    stem = card.get("first_conv")
    if isinstance(stem, (tuple, list)):
        stem = stem[0] if stem else None
    if stem:
        # The card describes the pretrained weights; the model may have been made for other images.
        channels = getattr(dict(model.named_modules()).get(stem), "in_channels", channels)
    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if made_for:
        yield (channels, *made_for)
    elif not card.get("fixed_input_size"):
        yield (channels, _SMALL, _SMALL)
    yield (channels, *size)


def _transformers_inputs(model: Any, first: Tensor) -> Iterator[dict[str, Tensor]]:
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids" and getattr(config, "vocab_size", None):
        ids = torch.arange(1, _TOKENS + 1, device=first.device) % config.vocab_size
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end < config.vocab_size:
            # Sequence classifiers of encoder-decoders look for the end token.
            ids = torch.where(ids == end, 0, ids)
            ids[-1] = end
        inputs = {"input_ids": ids[None]}
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            yield inputs | {"decoder_input_ids": ids[None]}
        yield inputs
    elif main == "pixel_values":
        size = getattr(config, "image_size", None) or _SMALL
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        yield {
            main: torch.zeros(
                1, getattr(config, "num_channels", 3), height, width, dtype=first.dtype, device=first.device
            )
        }
