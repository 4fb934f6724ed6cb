"""What can go wrong for a user, each kind with the exit code of the command line."""

__all__ = [
    "DDPMError",
    "DataError",
    "ElsewhereError",
    "LockedError",
    "LostProcessError",
    "ModelError",
    "TrainingError",
    "UsageError",
]


class DDPMError(Exception):
    """A mistake or a mishap that the user can do something about.

    message: names the flag or the file and says what is wrong. hint: what to do about it.
    The command line prints both and exits with `exit_code`; it shows no traceback.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DDPMError):
    """The command was called wrongly: a flag's value, or flags that contradict each other."""

    exit_code = 2


class DataError(DDPMError):
    """Images that are missing, unreadable or unfit for the request."""


class ModelError(DDPMError):
    """A model that cannot be found, read or run by this program."""


class TrainingError(DDPMError):
    """A training run that cannot go on."""


class LockedError(DDPMError):
    """Another process is at it already."""


class LostProcessError(TrainingError):
    """One of several processes that work together is gone, and the others cannot go on."""


class ElsewhereError(DDPMError):
    """Another process failed, and says why itself: this one only ends, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process failed")
        self.exit_code = exit_code
