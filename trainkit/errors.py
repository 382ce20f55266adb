"""The one exception that a person is meant to read.

Raise `UserError` at the edge (a bad configuration, file or argument) with one sentence that says what is wrong, where,
and what to do next. Console scripts print it without a traceback and exit with its code. Anything else that escapes is
a bug and keeps its traceback.
"""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_NON_FINITE = 3
EXIT_WATCHDOG = 4
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A problem that the user can fix; `str(error)` is the whole message."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
