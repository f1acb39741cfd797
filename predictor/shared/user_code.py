"""Functions and classes of users' own code, named as package.module:name."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from predictor.errors import UsageError, unknown


def named(what: str, name: str, known: Iterable[str]) -> Callable[..., Any]:
    """The user's own function or class `name`, in the form "package.module:name".

    Args:
        what: its kind, such as "policy", for the error.
        name: what to import.
        known: the names that need no module, for the error.

    Raises:
        UsageError: for a name of another form, a module that cannot be imported, and one without such a name.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise unknown(what, name, known, "package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"{what} {name!r}: importing {module_name} fails ({error}): run from the folder that holds it, or set "
            "PYTHONPATH"
        ) from error
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        raise UsageError(f"{what} {name!r}: {module_name} has no function or class {attribute}")
    return found


def code_of(found: Callable[..., Any]) -> str:
    """A fingerprint of the file that defines a function or class, so that results of changed code differ.

    Empty if there is no file, as in a notebook. The file's imports are not in it.
    """
    try:
        path = inspect.getsourcefile(found)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""
    except (OSError, TypeError):
        return ""
