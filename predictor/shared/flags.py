"""What the command lines share: flags made from a configuration's fields, and errors without tracebacks."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from predictor.errors import UsageError

Config = TypeVar("Config")


def option(default: Any, help: str) -> Any:
    """A field of a configuration dataclass, with the help text of its flag."""
    return field(default=default, metadata={"help": help})


def add_fields(parser: argparse.ArgumentParser, config: type[Any], only: Sequence[str] | None = None) -> None:
    """Add a flag for each field of the dataclass `config`, with its type, its default and its help.

    A field may be a bool, an int, a float, a str, one of the last three or None, or a Literal. The help is that of
    `option`. `only` names the fields to add; by default all are.
    """
    kinds = get_type_hints(config)
    for each in fields(config):
        if only is None or each.name in only:
            _add_flag(parser, each.name, kinds[each.name], each.default, each.metadata.get("help", ""))


def from_flags(config: type[Config], flags: argparse.Namespace) -> Config:
    """Build the dataclass `config` from the flags that `add_fields` made of it."""
    given = vars(flags)
    return config(**{each.name: given[each.name] for each in fields(config) if each.name in given})  # type: ignore[arg-type]


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a program's main function and leave with its exit status.

    The status is 2 for an error that the user can cure, 130 for Ctrl-C, and 1 where nothing can be printed. Characters
    that the output's encoding lacks are printed as escapes.
    """
    if sys.stdout is None:  # closed, as by `>&-`: the next file that is opened would take its place
        print("error: standard output is closed: leave it open, or send it to /dev/null", file=sys.stderr)
        sys.exit(1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main(None) or 0
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader, as in `... | head`, wants no more
        _discard_output()
        status = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: {error}: make room where this command writes, and where its output goes", file=sys.stderr)
        _discard_output()
        status = 1
    sys.exit(status)


def _discard_output() -> None:
    """Let nothing more be printed, also not what Python still holds at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _add_flag(parser: argparse.ArgumentParser, name: str, kind: Any, default: Any, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    help = f"{text.replace('%', '%%')} (default: %(default)s)".lstrip()
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
    elif get_origin(kind) is Literal:
        parser.add_argument(flag, choices=get_args(kind), default=default, help=help)
    else:
        (convert,) = [part for part in get_args(kind) or (kind,) if part is not NoneType]
        parser.add_argument(flag, type=convert, default=default, metavar=convert.__name__.upper(), help=help)
