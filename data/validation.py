"""Turns parsed JSON or TOML into a pydantic model, and pydantic's complaints into our errors: path, value, cure."""

import difflib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast, get_args

from pydantic import TypeAdapter, ValidationError

from predictor.errors import UsageError

M = TypeVar("M")
_MOST_LINES = 5


def validated(model: type[M], content: Any, where: str, fault: type[Exception] = UsageError) -> M:
    """Check content against a model, without converting: "1" is no integer, and neither is `true`.

    Args:
        model: A pydantic model, a dataclass (pydantic's or not), or any other type that pydantic knows.
        content: What `json.loads` or `tomllib.loads` returned.
        where: The file, and what in it, for the start of each line of the error.
        fault: The exception to raise.

    Returns:
        An instance of the model.

    Raises:
        fault: The content does not fit. One line for each of the first five errors, such as
            "FILE: seeds[2]: 'x': give a valid integer".
    """
    instance, lines = _parsed(model, content)
    if lines:
        raise fault("\n".join(f"{where}: {line}" for line in lines[:_MOST_LINES]))
    return cast(M, instance)


def faults_of(model: Any, content: Any) -> list[str]:
    """What `validated` would refuse: a line for each error, with the path into the content, the value and the cure."""
    return _parsed(model, content)[1]


def _parsed(model: Any, content: Any) -> tuple[Any, list[str]]:
    """The instance and no errors, or None and the lines of the errors."""
    try:
        # Strict JSON rather than strict Python: a list may become a tuple, and text a Path.
        return _adapter(model).validate_json(json.dumps(content, default=str), strict=True), []
    except RecursionError:
        return None, ["nested too deeply"]
    except ValidationError as error:
        return None, [f"{path}: {what}" if path else what for path, what in _explained(error, model, content)]


def _explained(error: ValidationError, model: Any, content: Any) -> list[tuple[str, str]]:
    """What is wrong, as pairs of a path into the content, such as "seeds[2]", and a value with its cure."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in error.errors(include_url=False):
        path, cure, value = _path(each["loc"], content), each["msg"], f"{each['input']!r:.60}: "
        if each["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            cure, value = f"there is no such key: {suggestion(each['loc'][-1], _keys(model, each['loc'][:-1]))}", ""
        elif each["type"] in ("missing", "missing_argument"):
            cure, value = "missing: add it", ""
        elif each["type"] == "literal_error" and isinstance(each["input"], str):
            close = _closest(each["input"], each["ctx"]["expected"].split("'")[1::2])
            cure = f"{close}{cure}"
        elif each["type"] == "json_invalid":
            cure, value = "nested too deeply, or text that is no Unicode", ""
        elif isinstance(each["input"], dict | list) or each["type"] == "value_error":
            value = ""  # the message names what matters of it
        cures = found.setdefault((path, value), [])
        cures.append(_cure(cure))
    # Members of a union complain one by one, about the same value.
    return [(path, value + " or ".join(dict.fromkeys(cures))) for (path, value), cures in found.items()]


def suggestion(name: object, known: Iterable[str]) -> str:
    """What may have been meant by an unknown name: the closest one that there is, and all that there are."""
    known = list(known)
    return f"{_closest(str(name), known)}there are {', '.join(known)}"


@functools.cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _cure(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("a valid array", "a valid list")
    return message.replace("Input should be less", "give a number less").replace(
        "Input should be greater", "give a number greater"
    ).replace("Input should be", "give")  # fmt: skip


def _path(loc: tuple[int | str, ...], content: Any) -> str:
    """The location as one would write it. Names of a union's members, which pydantic puts in between, are left out."""
    path = ""
    for position, part in enumerate(loc):
        if isinstance(part, int) and isinstance(content, list | tuple) and part < len(content):
            path, content = f"{path}[{part}]", content[part]
        elif isinstance(content, Mapping) and (part in content or position == len(loc) - 1):
            path, content = f"{path}.{part}" if path else str(part), content.get(part)
    return path


def _keys(model: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys that a model has at a location inside it."""
    fields = {name: kind for part in _models(model) for name, kind in _fields(part).items()}
    if not loc:
        return list(fields)
    return _keys(fields.get(str(loc[0]), model), loc[1:])  # an index, or a key of a dict, leads to no other model


def _models(annotation: Any) -> Iterator[Any]:
    """The models that occur in an annotation, such as X in `list[X] | None`."""
    yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _fields(model: Any) -> dict[str, Any]:
    fields = getattr(model, "__pydantic_fields__", None)
    if fields is None:  # a dataclass of the standard library
        fields = getattr(model, "__dataclass_fields__", {})
        return {name: field.type for name, field in fields.items()}
    return {field.alias or name: field.annotation for name, field in fields.items()}
