"""Errors that a user can act on, each class with its exit code on the command line."""

__all__ = [
    "DDPMError",
    "DataError",
    "ElsewhereError",
    "LockedError",
    "LostProcessError",
    "ModelError",
    "TrainingError",
    "UsageError",
    "reason",
]


class DDPMError(Exception):
    """An error that the user can do something about.

    message: the flag or the file, and the problem. hint: what to do about it.
    The command line prints both and exits with `exit_code`; it shows no traceback.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DDPMError):
    """Wrong usage: a bad value of a flag, or flags that contradict each other."""

    exit_code = 2


class DataError(DDPMError):
    """Images that are missing, unreadable or unsuitable for the request."""


class ModelError(DDPMError):
    """A model that cannot be found, read or run by this program."""


class TrainingError(DDPMError):
    """A training run that cannot continue."""


class LockedError(DDPMError):
    """Another process has locked the run or the folder."""


class LostProcessError(TrainingError):
    """A process of a distributed run is gone, so the others cannot continue."""


class ElsewhereError(DDPMError):
    """Another process failed and reports its error. This one only ends, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process failed")
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """An error in words, without the number and the brackets of an OSError: `file.png: No such file or directory`."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
