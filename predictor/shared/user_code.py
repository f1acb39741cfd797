"""What users name from their own code, as package.module:name."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from predictor.errors import UsageError, unknown


def named(what: str, name: str, known: Iterable[str]) -> Callable[..., Any]:
    """The user's own function or class called `name`, which is "package.module:name".

    what: what it is to be, such as "policy", for the error. known: the names that need no module, for the error too.
    Raises UsageError for a name that has another form, a module that cannot be imported, and one that holds no such
    thing.
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
    """A fingerprint of the file that holds a user's function or class, so that results of changed code are told apart.

    Empty where there is no file, as in a notebook. What the file imports is not in it.
    """
    try:
        path = inspect.getsourcefile(found)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""
    except (OSError, TypeError):
        return ""
