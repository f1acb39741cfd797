"""A hook of the library's own on the user's model."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

_NOTHING: Callable[..., None] = nullcontext().__exit__
"""A function of Python's own that takes anything and does nothing."""


class PassHook:
    """A forward hook that does nothing in a copied or pickled model, nor where a pass is recorded by another tool.

    Args:
        callback: called as the hook is. A hook with named inputs that is removed during the call that it belongs to
            gets none.
    """

    def __init__(self, callback: Callable[..., None]) -> None:
        self._callback = callback

    def __call__(self, module: nn.Module, *given: Any) -> None:
        """Call the callback, unless `torch.compile`, `torch.jit.trace` or `torch.fx` records this pass."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(given)):
            self._callback(module, *given)

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # which torch.jit.script asks for
            raise AttributeError(
                "torch.jit.script cannot compile the hook by which a FreezeController sees the model's passes: script "
                "the model before the controller is made, or after its close()"
            )
        raise AttributeError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # Names of this library in a pickle would ask for it where the model is loaded.
        return getattr, (nullcontext(), "__exit__")


class FormerHook:
    """What is in place of a hook in models that an earlier version has saved."""

    pre = post = property(lambda self: _NOTHING)

    def __new__(cls, *given: object) -> Any:
        """Itself where `pre` or `post` is asked for, else nothing."""
        return _NOTHING if given else super().__new__(cls)
