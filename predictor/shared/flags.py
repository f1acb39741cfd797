"""What the command lines share: flags made from a configuration's fields, and errors without tracebacks."""

import argparse
import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from predictor.errors import UsageError

Config = TypeVar("Config")
_CHECKOUT = Path(__file__).parents[2]


def add_fields(
    parser: argparse.ArgumentParser, source: str, class_name: str, only: Sequence[str] | None = None
) -> None:
    """Add a flag for each field of a dataclass: its type, its default, and the docstring below it as the help.

    source: the file that defines the class, relative to the checkout, such as "predictor/training/fit.py". It is read
        as text and not imported, because importing torch would make `--help` wait for seconds.
    only: the fields to add; all of them by default.
    """
    for name, kind, default, text in _fields(source, class_name):
        if only is None or name in only:
            _add_flag(parser, name, kind, default, text)


def from_flags(kind: type[Config], flags: argparse.Namespace) -> Config:
    """Build the dataclass `kind` from the flags that `add_fields` made of it."""
    given = vars(flags)
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})  # type: ignore[arg-type]


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a program's main function and leave with its exit status.

    The status is 2 for an error that the user can cure and 130 for Ctrl-C.
    """
    try:
        status = main(None) or 0
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def _fields(source: str, class_name: str) -> Iterator[tuple[str, str, Any, str]]:
    """Name, type, default and docstring of every field of a dataclass, read from its source text."""
    tree = ast.parse((_CHECKOUT / source).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = str(after.value.value) if documented else ""  # type: ignore[union-attr]
            yield node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value), text


def _add_flag(parser: argparse.ArgumentParser, name: str, kind: str, default: Any, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    text = " ".join(text.split()).rstrip(".").replace("%", "%%") + " (default: %(default)s)"
    if kind == "bool":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif kind.startswith("Literal["):
        choices = ast.literal_eval(kind.removeprefix("Literal"))
        parser.add_argument(flag, choices=choices, default=default, help=text)
    else:
        convert = {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")]
        parser.add_argument(flag, type=convert, default=default, metavar=kind.split(" ")[0].upper(), help=text)
