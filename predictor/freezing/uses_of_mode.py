"""What a class does by the mode that its modules are in, read from its source."""

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from functools import cache

_CHANCE = re.compile(
    r"(?i)drop|rand|noise|jitter|prob|bernoulli|dirichlet|gauss|normal_|augment|aug_|_aug|requires_grad"
)
_STATISTICS = re.compile(r"running|momentum|decay|codebook|\bema|_ema|self(\.\w+)+_\(")


@cache
def uses_of_mode(kind: type) -> frozenset[str]:
    """What a class does by `self.training`: "chance" (dropout), "statistics" or "other". Bases count but for torch's.

    What decides over a result's form, or over which of two computations is done, is "other".
    """
    return frozenset().union(*map(_uses_in_class, own_classes(kind)))


def own_classes(kind: type) -> list[type]:
    """A class and its bases, without those of torch."""
    return [part for part in kind.__mro__ if part.__module__.partition(".")[0] not in ("torch", "builtins")]


def _uses_in_class(kind: type) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made at a prompt or by exec; the safe guess is dropout
        return {"chance"}
    (definition,) = tree.body
    uses: set[str] = set()
    for method in getattr(definition, "body", ()):
        if getattr(method, "name", "") not in ("__init__", "train"):
            uses |= _uses_in(method)
    return uses


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
