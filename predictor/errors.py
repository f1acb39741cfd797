"""What a user can cure: every error that names a value and says what to do about it."""


class UsageError(ValueError):
    """A setting, name or call that cannot work. The message names the value and the cure."""


class FileFault(UsageError):
    """A file that is missing, broken, of another version or hostile. The message names the file and the fault."""


class DivergedError(ArithmeticError):
    """A loss that is no longer a finite number."""
