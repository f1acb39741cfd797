"""The errors of the toolkit: each names a value and the cure."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A setting, name or call that cannot work. The message names the value and the cure."""


class FileFault(UsageError):
    """A file that is missing, broken, hostile or of another version. The message names the file and the fault."""


class DamagedFile(FileFault):
    """A file whose content is damaged, so that it has to be made again. Not one that merely cannot be read."""


class DivergedError(ArithmeticError):
    """A loss that is not finite any more."""


def unknown(what: str, name: object, known: Iterable[str], more: str = "") -> UsageError:
    """The error for a name that does not exist. It suggests the closest name and lists all.

    Args:
        what: what is named, such as "policy".
        name: the name that was given.
        known: all names that exist.
        more: what else may be given, for the end of the list.
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listed = [repr(each) if "," in each else each for each in known]  # so that it is clear where a name ends
    return UsageError(f"there is no {what} {name!r}: {hint}there are {', '.join([*listed, *([more] if more else [])])}")
