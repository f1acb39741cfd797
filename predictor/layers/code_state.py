"""What a model's code keeps outside its modules: in global variables, classes, closures and caches."""

import functools
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

_CLEAN = sys.stdlib_module_names | {
    "accelerate",
    "lightning",
    "numpy",
    "peft",
    "predictor",
    "pytorch_lightning",
    "timm",
    "torch",
    "torchvision",
    "transformers",
}
"""Packages whose modules keep nothing there that a forward pass changes, or only what is their own affair."""
_OURS = {"predictor", "collect", "evaluate"}
"""Packages whose hooks record what a pass beside the training computes."""
_MOST = 1000
"""Functions that are followed."""
_CACHE = type(functools.lru_cache(len))


def restores_of_code(model: nn.Module, keep: Callable[[Any], None], more: Iterator[Any]) -> list[Callable[[], object]]:
    """What restores the variables that the code of a model's own classes names, as they are now.

    Followed are the methods of its modules' classes, the user's hooks and what `more` has, and the functions, classes
    and objects that they name. Not followed is what has no Python code.

    Args:
        model: the model.
        keep: has the content of one value restored.
        more: further functions and classes, such as those that are found in the values.
    """
    restores: list[Callable[[], object]] = []
    variables: dict[tuple[int, str], tuple[Any, str, Any]] = {}  # held, so that no other holder gets the same id
    for holder, name, value in _variables_of(model, more):
        if (id(holder), name) in variables:
            continue
        variables[id(holder), name] = holder, name, value
        if isinstance(value, _CACHE):
            restores.append(functools.partial(_clear_if_grown, value, value.cache_info().currsize))
        elif not isinstance(value, (FunctionType, type, ModuleType)):
            restores.append(functools.partial(_bind_again, holder, name, value))
            keep(value)
    return restores


def _variables_of(model: nn.Module, more: Iterator[Any]) -> Iterator[tuple[Any, str, Any]]:
    """(holder, name, value) of each variable that the code names."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if not _is_clean(cls)}
    stack: list[Any] = [code for cls in classes for code in _code_in(cls)]
    owners: dict[int, list[Any]] = {}  # of a hook that is a method, its object, by the id of its function
    for hook in users_hooks(model):
        yield [hook], "", hook
        for function, owner in _calls_of(hook):
            stack.append(function)
            owners.setdefault(id(function), []).extend(owner)
    seen = set[int]()
    while len(seen) < _MOST:
        if not stack:
            added = next(more, None)
            if added is None:
                return
            stack += [code for each in getattr(added, "__mro__", [added]) for code in _code_in(each)]
            continue
        function = stack.pop()
        if id(function) in seen or _is_clean(function):
            continue
        seen.add(id(function))
        names = _names_in(function.__code__)
        holders: list[Any] = [function.__globals__, *classes, *owners.get(id(function), ())]
        for index in range(2):  # what a global object holds is one step further
            found = [(holder, *pair) for holder in holders for pair in _named(holder, names)]
            yield from found
            stack += [code for *_, value in found for code in _code_in(value)]
            holders = [] if index else [value for *_, value in found if _holds_variables(value)]
        for cell in function.__closure__ or ():
            try:
                yield cell, "cell_contents", cell.cell_contents
                stack += _code_in(cell.cell_contents)
            except ValueError:  # it is empty
                continue
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield [default], "", default


def users_hooks(model: nn.Module) -> Iterator[Any]:
    """The user's hooks on the passes of a model's modules, of all modules, and on the gradients of its parameters."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    tables = [getattr(module, kind, None) for module in model.modules() for kind in kinds]
    tables += [getattr(nn.modules.module, f"_global{kind}", None) for kind in kinds]
    tables += [parameter._backward_hooks for parameter in model.parameters()]
    for hooks in filter(None, tables):
        yield from (hook for hook in hooks.values() if not _is_ours(hook))


def users_hooks_before(module: nn.Module) -> list[tuple[Callable[..., Any], bool]]:
    """The user's hooks before a module's call, each with whether it takes named inputs."""
    named = module._forward_pre_hooks_with_kwargs
    return [(hook, number in named) for number, hook in module._forward_pre_hooks.items() if not _is_ours(hook)]


def _calls_of(hook: Any) -> Iterator[tuple[FunctionType, list[Any]]]:
    """The functions that a hook runs, each with the object that it is a method of."""
    if isinstance(hook, functools.partial):
        for part in (hook.func, *hook.args, *hook.keywords.values()):
            yield from _calls_of(part)
    elif isinstance(hook, FunctionType):
        yield hook, []
    elif isinstance(hook, MethodType) and isinstance(hook.__func__, FunctionType):
        yield hook.__func__, [hook.__self__]
    elif isinstance(call := vars(type(hook)).get("__call__"), FunctionType):
        yield call, [hook]


def _is_ours(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    names = {getattr(each, "__module__", None) or "" for each in (hook, type(getattr(hook, "__self__", hook)))}
    return any(name.partition(".")[0] in _OURS for name in names)


def _code_in(value: Any) -> Iterator[FunctionType]:
    """The functions behind a value."""
    if isinstance(value, (staticmethod, classmethod, _CACHE)):
        value = value.__wrapped__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, type) and not _is_clean(value):
        yield from (code for own in vars(value).values() if not isinstance(own, type) for code in _code_in(own))


def _is_clean(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _CLEAN


def _holds_variables(value: Any) -> bool:
    """Whether a global value is an object, a class or a module of the user's own with variables in it."""
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] not in _CLEAN
    own = value if isinstance(value, type) else type(value)
    return hasattr(value, "__dict__") and not isinstance(value, FunctionType) and not _is_clean(own)


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def _named(holder: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
    space = holder if isinstance(holder, dict) else vars(holder)
    return ((name, space[name]) for name in names if name in space and not isinstance(space[name], property))


def _bind_again(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, list):  # a default value: its content alone can change
        return
    if isinstance(holder, dict):
        holder.update({} if holder.get(name) is value else {name: value})
    elif isinstance(holder, CellType):
        holder.cell_contents = value
    elif vars(holder).get(name) is not value:
        setattr(holder, name, value)


def _clear_if_grown(cache: Any, size: int) -> None:
    """What a pass of ours left in a cache may lack gradients, or be of our inputs."""
    if cache.cache_info().currsize > size:
        cache.cache_clear()
