"""What a class does by the mode that its modules are in, read from its source.

Read is what depends on a condition on `self.training`: the statement itself, what follows a branch that returns, and
the methods of the class that are called there.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TypeAlias

_CHANCE = re.compile(
    r"(?i)drop|rand|noise|jitter|prob|bernoulli|dirichlet|gauss|normal_|augment|aug_|_aug|requires_grad"
)
_STATISTICS = re.compile(r"running|momentum|decay|codebook|\bema|_ema|self(\.\w+)+_\(")
_DRAWS = re.compile(
    r"\b(rand|drop)\w*\(|random|dropout\w*\(|bernoulli|multinomial|poisson|\bnormal\(|\.r?sample\("
    r"|(normal|uniform|exponential|geometric|cauchy)_\("
)
"""Calls that draw random numbers. Whole methods are searched for them, where a word alone says too little."""
_OWN_CALL = re.compile(r"\bself\.\w+\(")
"""A call of another module, which stands still by itself, or of a method, which is searched too."""
_IN_PLACE = re.compile(r"(?<!_)_$")
"""The end of a method's name that changes a tensor in place."""
_LOSS = re.compile(r"(?i)loss|target|label|criteri|entropy|aux")
"""What a loop trains by, and expects in training."""

_Methods: TypeAlias = Mapping[str, ast.AST]
_Condition: TypeAlias = ast.If | ast.IfExp | ast.Assert


@cache
def uses_of_mode(kind: type) -> frozenset[str]:
    """What a class does by `self.training`: "chance" (dropout), "statistics" or "other". Bases count but for torch's.

    What decides over a result's form, or over which of two computations is done, is "other".
    """
    bodies = [_body_of(part) for part in own_classes(kind)]
    methods: dict[str, ast.AST] = {}
    for method in (each for body in bodies for each in body or () if isinstance(each, ast.FunctionDef)):
        methods.setdefault(method.name, method)
    uses = {"chance"} if None in bodies else set[str]()  # without source the safe guess is dropout
    for body in bodies:
        for each in body or ():
            if getattr(each, "name", "") not in ("__init__", "train"):
                uses |= _uses_in(each, methods)
    return frozenset(uses)


def own_classes(kind: type) -> list[type]:
    """A class and its bases, without those of torch."""
    return [part for part in kind.__mro__ if part.__module__.partition(".")[0] not in ("torch", "builtins")]


def _body_of(kind: type) -> list[ast.stmt] | None:
    """The statements of a class; None for one that was made at a prompt or by `exec`."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):
        return None
    return getattr(definition, "body", [])


def _uses_in(method: ast.stmt, methods: _Methods) -> set[str]:
    uses, seen = set(), set[ast.AST]()
    names: dict[str, str] = {}  # variables that hold the mode, and what they were set to
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Attribute, ast.BoolOp, ast.UnaryOp)):
            reads = list(_reads(node.value, names))
            own = {target.id: ast.unparse(node.value) for target in node.targets if isinstance(target, ast.Name)}
            seen.update(reads if own else ())
            names.update(own if reads else {})
    following = dict(_following([method]))
    for node in ast.walk(method):
        if isinstance(node, _Condition) and (reads := list(_reads(node.test, names))):
            seen.update(reads)
            said = " ".join(names[read.id] for read in reads if isinstance(read, ast.Name))
            use = _use_of(node, said)
            if use == "other" and not isinstance(node, ast.Assert):
                use = _use_beyond(*_branches(node, following.get(node, []), names), methods)
            uses.add(use)
        elif node not in seen and next(_reads(node, names, nested=False), None):
            uses.add("chance")  # given to a function, as to dropout
    return uses - {"checkpoint"}


def _reads(node: ast.AST, names: Collection[str], nested: bool = True) -> Iterator[ast.AST]:
    for part in ast.walk(node) if nested else (node,):
        if isinstance(part, ast.Attribute) and part.attr == "training" and ast.unparse(part.value) == "self":
            yield part
        if isinstance(part, ast.Name) and part.id in names and isinstance(part.ctx, ast.Load):
            yield part


def _use_of(node: _Condition, said: str) -> str:
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


def _following(
    statements: Sequence[ast.stmt], then: Sequence[ast.stmt] = ()
) -> Iterator[tuple[ast.AST, list[ast.stmt]]]:
    """Each statement inside, with all that follows it in its function, or in its loop."""
    for index, statement in enumerate(statements):
        after = [*statements[index + 1 :], *then]
        yield statement, after
        inside = () if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While)) else after
        for name in ("body", "orelse", "finalbody"):
            yield from _following(getattr(statement, name, ()), inside)


def _branches(
    node: ast.If | ast.IfExp, following: list[ast.stmt], names: Mapping[str, str]
) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """What is done in training alone, and what in evaluation mode alone. What follows a return belongs to the other."""
    first: list[ast.stmt]
    second: list[ast.stmt]
    if isinstance(node, ast.IfExp):
        first, second = [ast.Return(node.body)], [ast.Return(node.orelse)]
    elif _leaves(node.body):
        first, second = node.body, [*node.orelse, *following]
    elif _leaves(node.orelse):
        first, second = [*node.body, *following], node.orelse
    else:
        first, second = node.body, node.orelse
    return (second, first) if _asks_for_evaluation(node.test, names) else (first, second)


def _leaves(statements: Sequence[ast.stmt]) -> bool:
    return bool(statements) and isinstance(statements[-1], (ast.Return, ast.Continue, ast.Break))


def _asks_for_evaluation(test: ast.expr, names: Mapping[str, str]) -> bool:
    negated = any(
        next(_reads(part.operand, names), None)
        for part in ast.walk(test)
        if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not)
    )
    reads = [names[read.id] for read in _reads(test, names) if isinstance(read, ast.Name)]
    return negated != any("not self.training" in said for said in reads)


def _use_beyond(training: list[ast.stmt], evaluation: list[ast.stmt], methods: _Methods) -> str:
    """What is done in training alone, by whole branches and the methods that they call. In doubt it is "other"."""
    results = list(_returned(evaluation))
    if not all(any(_is_alike(value, result) for result in results) for value in _returned(training)):
        return "other"
    called = _with_called(training, methods)
    text = " ".join(map(_text, called))
    for_loss = bool(_LOSS.search(text))
    # Where a loss is computed, methods that give a result may keep what goes with it.
    written = {*_written(_with_called(training, methods, for_result=False) if for_loss else called)}
    if "gumbel" in text or any(map(_LOSS.search, written)):
        return "other"
    if written:
        return "statistics"
    return "chance" if _DRAWS.search(_OWN_CALL.sub("(", text)) and not for_loss else "other"


def _returned(statements: Iterable[ast.stmt]) -> Iterator[ast.expr | None]:
    for statement in statements:
        yield from (part.value for part in ast.walk(statement) if isinstance(part, ast.Return))


def _is_alike(value: ast.expr | None, result: ast.expr | None) -> bool:
    """Whether a value that is returned in training may be of the form of one that is returned in evaluation mode."""
    if value is None or result is None:
        return value is result
    if isinstance(result, ast.Call) and _OWN_CALL.match(called := ast.unparse(result.func) + "("):
        return isinstance(value, ast.Call) and ast.unparse(value.func) + "(" == called
    return _form(value) == _form(result)


def _form(value: ast.expr) -> tuple[object, ...]:
    size = len(value.elts) if isinstance(value, ast.Tuple) else None
    return size, isinstance(value, ast.Dict), bool(_LOSS.search(ast.unparse(value)))


def _with_called(statements: Sequence[ast.stmt], methods: _Methods, for_result: bool = True) -> list[ast.AST]:
    """Statements, and the methods that they call, and so on.

    Args:
        statements: the statements.
        methods: those of the class, by name.
        for_result: whether methods count that the statements call for a result.
    """
    parts = [part for statement in statements for part in ast.walk(statement)]
    waiting: list[ast.AST] = parts if for_result else [part.value for part in parts if isinstance(part, ast.Expr)]
    found: dict[ast.AST, None] = {}
    while waiting:
        method = methods.get(_called_method(waiting.pop()))
        if method is not None and method not in found:
            found[method] = None
            waiting += ast.walk(method)
    return [*statements, *found]


def _called_method(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
        return node.func.attr
    return ""


def _text(node: ast.AST) -> str:
    """The code, without what is said of it in a docstring."""
    if isinstance(node, ast.FunctionDef):
        return " ".join(ast.unparse(each) for each in node.body if not _is_said(each))
    return ast.unparse(node)


def _is_said(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _written(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The attributes of a module that are set or changed: `self.x = `, `self.x[i] += `, `self.x.mul_()`."""
    for part in (part for node in nodes for part in ast.walk(node)):
        place: ast.AST | None = None
        if isinstance(part, (ast.Attribute, ast.Subscript)) and isinstance(part.ctx, ast.Store):
            place = part
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and _IN_PLACE.search(part.func.attr):
            place = part.func.value
        while isinstance(place, (ast.Attribute, ast.Subscript)):
            if isinstance(place, ast.Attribute) and _is_self(place.value):
                yield place.attr
            place = place.value


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
