"""What a user can cure: every error that names a value and says what to do about it."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A setting, name or call that cannot work. The message names the value and the cure."""


class FileFault(UsageError):
    """A file that is missing, broken, of another version or hostile. The message names the file and the fault."""


class DamagedFile(FileFault):
    """A file whose content is spoilt: making it anew is all that helps. Not one that merely cannot be read."""


class DivergedError(ArithmeticError):
    """A loss that is no longer a finite number."""


def unknown(what: str, name: object, known: Iterable[str], more: str = "") -> UsageError:
    """The error for a name that does not exist, with the closest that does and all that do.

    what: what is named, such as "policy". more: what else may be given, for the end of the list.
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listed = [repr(each) if "," in each else each for each in known]  # else nobody sees where a name ends
    return UsageError(f"there is no {what} {name!r}: {hint}there are {', '.join([*listed, *([more] if more else [])])}")
