"""How the modules of a frozen layer stand still. Evaluation mode is more than that, so each kind is decided by itself.

| module | while frozen |
|---|---|
| normalization with running statistics | evaluation mode; `reset_running_stats` does nothing |
| dropout, stochastic depth, spectral norm, modules of the user's own | evaluation mode |
| attention and recurrent layers of torch.nn | keep their mode, with their `dropout` at 0. In evaluation mode attention takes a fused path that treats padding otherwise, and cuDNN refuses the backward pass of a recurrent layer |
| all else of torch.nn, which does the same in both modes | keeps its mode, and so do hooks on it that look at it, such as NEFTune's |
| modules that return something else in training, such as losses (the parts of torchvision's detectors) | keep their mode |
| blocks whose activations are checkpointed, in training only | keep their mode, if nothing else in them depends on it |
| fake quantization (quantization-aware training) | observers are off, once they have seen data |

A held module stays so through `model.train()`. `model.eval()` does what it always does. Copies and pickles of a model
are not held: their own `train` works. `release` gives back the rest.
"""  # noqa: E501 (a table has no line breaks)

import operator
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from predictor.freezing.uses_of_mode import own_classes, uses_of_mode

RECORD = "_before_freezing"
"""The attribute in which a module keeps what it was before, as plain data: copies and pickles take it along."""
_STANDS = ("train", "reset_running_stats", "enable_observer")
"""The methods that have stand-ins while their module is held."""


def hold(module: nn.Module, model: nn.Module | None = None) -> None:
    """Have a module stand still, in its own way. A second call looks at an observer that had seen nothing by then.

    Args:
        module: the module alone, without those inside it.
        model: the model whose mode it follows, if it does.
    """
    record = module.__dict__.setdefault(RECORD, {})
    if _is_fake_quantize(module) and "observes" not in record and _has_observed(module):
        observed: Any = module.observer_enabled
        record["observes"] = int(observed[0])
        module.disable_observer()  # type: ignore[operator]
        module.__dict__["enable_observer"] = _ObserverSwitch(module, record)
    if "mode" in record:
        return
    record["mode"] = module.training
    record["follows"] = model is None or module.training == model.training
    if _stands_still_in_evaluation(module):
        module.__dict__["train"] = _HeldMode(module, model, record)
        module.training = False
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.__dict__["reset_running_stats"] = _Ignored(module, "reset_running_stats")
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout:
        module.dropout = _Off(module.dropout)


def unhold(module: nn.Module, model: nn.Module | None = None) -> bool:
    """Undo `hold`, in a copy too, and say whether there was something to undo.

    Args:
        module: the module alone.
        model: the model whose mode it takes, if it followed that.
    """
    record = module.__dict__.get(RECORD, {})
    if "mode" not in record:
        return False
    for name in _STANDS:
        own = module.__dict__.get(name)
        if isinstance(own, _Stand):
            own.leave()
        elif _is_of_class(module, name):
            del module.__dict__[name]
    if _stands_still_in_evaluation(module):
        module.training = model.training if model is not None and record["follows"] else record["mode"]
    dropout: Any = getattr(module, "dropout", None)
    if isinstance(dropout, _Off):
        setattr(module, "dropout", dropout.former)  # noqa: B010 (nn.Module declares no such attribute)
    if record.get("observes"):
        module.enable_observer()  # type: ignore[operator]
    for key in ("mode", "follows", "observes"):
        record.pop(key, None)
    if not record:
        del module.__dict__[RECORD]
    return True


def is_held(module: nn.Module) -> bool:
    """Whether a module stands still, or was copied from one that did."""
    return "mode" in module.__dict__.get(RECORD, {})


def mode_and_attributes(module: nn.Module) -> tuple[bool | None, int]:
    """A module's mode, and how many attributes it has but for those by which it is held.

    The mode is None for a module that is held and whose code does the same in both modes.
    """
    own = module.__dict__
    if RECORD not in own:
        return module.training, len(own)
    count = len(own) - 1
    for name in _STANDS:
        stand = own.get(name)
        if isinstance(stand, _Stand) and stand.former is None:
            count -= 1
    kind: type = type(module)
    if isinstance(own.get("train"), _HeldMode) and not _reads_its_mode(kind):
        return None, count
    return module.training, count


@cache
def _reads_its_mode(kind: type) -> bool:
    """Whether modules of a class may do something else in evaluation mode, as far as source code tells."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    of_torch = [part for part in kind.__mro__ if part.__module__.startswith("torch.nn.modules")]
    return bool(uses_of_mode(kind)) or not {*of_torch} <= {nn.Module, *containers}


def note_trained(modules: Iterable[nn.Module], parameters: set[int]) -> set[int]:
    """Note in the modules which of these parameters they own, by id: those trained until now. Returns the others."""
    left = set(parameters)
    for module in modules:
        names = [name for name, parameter in module._parameters.items() if id(parameter) in parameters]
        left -= {id(module._parameters[name]) for name in names}
        if names:
            record = module.__dict__.setdefault(RECORD, {})
            record["trained"] = sorted({*record.get("trained", ()), *names})
    return left


def forget_trained(modules: Iterable[nn.Module], parameters: set[int] | None = None) -> Iterator[nn.Parameter]:
    """Give the parameters that were noted, of all or of these by id, and note them no more."""
    for module in modules:
        record = module.__dict__.get(RECORD, {})
        for name in list(record.get("trained", ())):
            parameter = _named(module, name)
            if parameters is None or id(parameter) in parameters:
                record["trained"] = [other for other in record["trained"] if other != name]
                if parameter is not None:
                    yield parameter
        if "trained" in record and not record["trained"]:
            del record["trained"]
        if not record:
            module.__dict__.pop(RECORD, None)


def _named(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that had this name, also where pruning or spectral norm has come or gone since."""
    held = dict(module._parameters.items())  # a scripted module has no more than items
    names = (name, f"{name}_orig", name.removesuffix("_orig"))
    return next((held[other] for other in names if held.get(other) is not None), None)


def users_train(module: nn.Module) -> Callable[..., Any] | None:
    """The `train` that the user gave a module, as in `encoder.train = disabled_train`, also while ours covers it."""
    own: Any = module.__dict__.get("train")
    if isinstance(own, _Stand):
        return own.former
    return None if _is_of_class(module, "train") else own


class _Stand:
    """Stands in for a method of one module. In a copied or pickled model the method is the class's again.

    An attribute of the instance is found before the class's method. It costs nothing in the forward pass, and compiled
    code needs not be made again.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.former: Callable[..., Any] | None = module.__dict__.get(name)

    def leave(self) -> None:
        """Give the name back to whatever had it."""
        del self.module.__dict__[self.name]
        if self.former is not None:
            self.module.__dict__[self.name] = self.former

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy has no attributes yet when this is called for it, so `getattr` finds the class's method. Names of
        # this library in a pickle would ask for it where the model is loaded.
        if self.former is not None:
            return operator.itemgetter(0), ((self.former,),)
        return getattr, (self.module, self.name)


class _HeldMode(_Stand):
    """A `train` that leaves its module in evaluation mode, and notes the mode that the module would be in."""

    def __init__(self, module: nn.Module, model: nn.Module | None, record: dict[str, Any]) -> None:
        super().__init__(module, "train")
        self.model, self.record = model, record

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.module.training = self.record["mode"]
        (self.former or partial(type(self.module).train, self.module))(*args, **kwargs)  # for the modules inside too
        self.record["mode"] = self.module.training
        self.record["follows"] = self.model is None or self.module.training == self.model.training
        self.module.training = False
        return self.module


class _Ignored(_Stand):
    """A method that does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _ObserverSwitch(_Stand):
    """Notes whether an observer is to be on later, and leaves it off."""

    def __init__(self, module: nn.Module, record: dict[str, Any]) -> None:
        super().__init__(module, "enable_observer")
        self.record = record

    def __call__(self, enabled: bool = True) -> None:
        self.record["observes"] = int(enabled)


class _Off(float):
    """A dropout probability of zero that is the former one again in a copied or pickled model."""

    former: float

    def __new__(cls, former: float) -> "_Off":
        """Zero in place of `former`."""
        off = super().__new__(cls, 0.0)
        off.former = former
        return off

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (self.former,)


def _is_of_class(module: nn.Module, name: str) -> bool:
    """Whether an attribute is the class's own method, as copies have it in place of ours."""
    own: Any = module.__dict__.get(name)
    return getattr(own, "__self__", None) is module and own.__func__ is getattr(type(module), name, None)


def _is_fake_quantize(module: nn.Module) -> bool:
    names = ("observer_enabled", "fake_quant_enabled")
    return all(isinstance(getattr(module, name, None), Tensor) for name in names) and hasattr(module, "enable_observer")


def _has_observed(module: Any) -> bool:
    """Whether an observer has seen data. Without any it has no range to quantize by."""
    least = getattr(getattr(module, "activation_post_process", None), "min_val", None)
    return not isinstance(least, Tensor) or bool(least.numel() and least.isfinite().all())


def _stands_still_in_evaluation(module: nn.Module) -> bool:
    """Whether a module has to be in evaluation mode to stand still, and may be."""
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU)):
        return True
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer)):
        return False
    if any(base.__name__ == "GraphModule" for base in type(module).__mro__):
        return False  # its code looks at no mode, and it could not be pickled with a reference to itself
    if any(type(hook).__module__ == "torch.nn.utils.spectral_norm" for hook in module._forward_pre_hooks.values()):
        return True
    kind: type = type(module)
    if not own_classes(kind):  # of torch alone: what remains of torch.nn does the same in both modes
        bases = (base for base in kind.__mro__ if base is not nn.Module)
        return not any(base.__module__.startswith("torch.nn.modules") for base in bases)
    uses = uses_of_mode(kind)
    if not uses:
        return not (getattr(module, "gradient_checkpointing", False) or hasattr(module, "neftune_noise_alpha"))
    return "statistics" in uses or "other" not in uses
