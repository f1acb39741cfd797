"""The tensors inside nested values, such as a model's inputs and outputs."""

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Value = TypeVar("Value")


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and other containers that PyTorch's pytrees know, in order."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def copied(value: Value) -> Value:
    """The same containers anew, with copies of the tensors: what a pass pops or writes to is not the user's."""
    made: Value = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
    return made
