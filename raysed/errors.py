"""Errors whose text is an answer: what was found, what was expected, what to change.  Each class has its exit code."""


class RaysedError(Exception):
    """Base of all errors raised on purpose; `jobs` print it in one line and exit with its code."""

    exit_code = 1


class UsageError(RaysedError):
    """Bad flag, field, config, path or selection."""

    exit_code = 2


class RunHeldError(RaysedError):
    """Another driver holds the run directory."""

    exit_code = 3


class DataError(RaysedError):
    """Data that cannot be used, or more bad tiles than the budget allows."""

    exit_code = 4


class DivergedError(RaysedError):
    """Loss or weights stopped being finite."""

    exit_code = 5


class StorageError(RaysedError):
    """Storage that cannot be reached, or refuses."""

    exit_code = 6


class ResourcesError(RaysedError):
    """The cluster cannot give what was asked for."""

    exit_code = 7


class WaitingForLabels(RaysedError):
    """The run waits for labels and holds no cluster."""

    exit_code = 8


def rebuilt(kind: str, text: str) -> RaysedError:
    """The error whose class name and text came from another process: Ray wraps what a task raises and can lose the cause."""
    found = globals().get(kind)
    known = isinstance(found, type) and issubclass(found, RaysedError)
    return found(text) if known else RaysedError(text)  # type: ignore[misc, operator]


EXIT_INTERRUPTED = {2: 130, 15: 143}
"""Signal number -> exit code of a run that stopped after a commit."""
