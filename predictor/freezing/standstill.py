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

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

RECORD = "_before_freezing"
"""The attribute in which a module keeps what it was before, as plain data: copies and pickles take it along."""
_STANDS = ("train", "reset_running_stats", "enable_observer")
"""The methods that have stand-ins while their module is held."""
_CHANCE = re.compile(
    r"(?i)drop|rand|noise|jitter|prob|bernoulli|dirichlet|gauss|normal_|augment|aug_|_aug|requires_grad"
)
_STATISTICS = re.compile(r"running|momentum|decay|codebook|\bema|_ema|self(\.\w+)+_\(")


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
    parts = [part for part in kind.__mro__ if part.__module__.partition(".")[0] not in ("torch", "builtins")]
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    of_torch = [part for part in kind.__mro__ if part.__module__.startswith("torch.nn.modules")]
    return any(map(_uses_of_mode, parts)) or not {*of_torch} <= {nn.Module, *containers}


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
    if any(kind.__name__ == "GraphModule" for kind in type(module).__mro__):
        return False  # its code looks at no mode, and it could not be pickled with a reference to itself
    if any(type(hook).__module__ == "torch.nn.utils.spectral_norm" for hook in module._forward_pre_hooks.values()):
        return True
    own = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    if not own:  # of torch alone: what remains of torch.nn does the same in both modes
        bases = (kind for kind in type(module).__mro__ if kind is not nn.Module)
        return not any(kind.__module__.startswith("torch.nn.modules") for kind in bases)
    uses = frozenset().union(*map(_uses_of_mode, own))
    if not uses:
        return not (getattr(module, "gradient_checkpointing", False) or hasattr(module, "neftune_noise_alpha"))
    return "statistics" in uses or "other" not in uses


@cache
def _uses_of_mode(kind: type) -> frozenset[str]:
    """What a class does by `self.training`, by its source: "chance" (dropout), "statistics" or "other".

    What decides over a result's form, or over which of two computations is done, is "other".
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made at a prompt or by exec; the safe guess is dropout
        return frozenset({"chance"})
    (definition,) = tree.body
    uses: set[str] = set()
    for method in getattr(definition, "body", ()):
        if getattr(method, "name", "") not in ("__init__", "train"):
            uses |= _uses_in(method)
    return frozenset(uses)


def _uses_in(method: ast.AST) -> set[str]:
    uses, seen = set(), set[ast.AST]()
    names: dict[str, str] = {}  # variables that hold the mode, and what they were set to
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Attribute, ast.BoolOp, ast.UnaryOp)):
            reads = list(_reads(node.value, names))
            own = {target.id: ast.unparse(node.value) for target in node.targets if isinstance(target, ast.Name)}
            seen.update(reads if own else ())
            names.update(own if reads else {})
    for node in ast.walk(method):
        if isinstance(node, (ast.If, ast.IfExp, ast.Assert)) and (reads := list(_reads(node.test, names))):
            seen.update(reads)
            said = " ".join(names[read.id] for read in reads if isinstance(read, ast.Name))
            uses.add(_use_of(node, said))
        elif node not in seen and next(_reads(node, names, nested=False), None):
            uses.add("chance")  # given to a function, as to dropout
    return uses - {"checkpoint"}


def _reads(node: ast.AST, names: Collection[str], nested: bool = True) -> Iterator[ast.AST]:
    for part in ast.walk(node) if nested else (node,):
        if isinstance(part, ast.Attribute) and part.attr == "training" and ast.unparse(part.value) == "self":
            yield part
        if isinstance(part, ast.Name) and part.id in names and isinstance(part.ctx, ast.Load):
            yield part


def _use_of(node: ast.If | ast.IfExp | ast.Assert, said: str) -> str:
    """What is done by the mode here. said: what the variables in the condition were set to."""
    text = f"{ast.unparse(node)} {said}"
    if "checkpoint" in f"{ast.unparse(node.test)} {said}":
        return "checkpoint"
    if "gumbel_softmax" in text:
        return "other"  # a sample that lets gradients pass, and in evaluation mode a choice that lets none
    targets = [t for part in ast.walk(node) if isinstance(part, ast.Assign) for t in part.targets]
    targets += [part.target for part in ast.walk(node) if isinstance(part, ast.AugAssign)]
    own = any(isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self" for t in targets)
    if isinstance(node, ast.If) and (own or _STATISTICS.search(text)):
        return "statistics"
    zero = isinstance(node, ast.IfExp) and any(
        isinstance(branch, ast.Constant) and not branch.value for branch in (node.body, node.orelse)
    )
    return "chance" if zero or _CHANCE.search(text) else "other"
