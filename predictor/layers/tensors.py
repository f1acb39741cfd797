"""The tensors inside nested values, such as a model's inputs and outputs."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and other containers that PyTorch's pytrees know, in order."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
