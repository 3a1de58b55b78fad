"""How a command ends: the exit codes, and the two ways in which it refuses."""

from __future__ import annotations

from pyroem.loop import Status

SUCCESS, AT_FAULT, ENDED_BADLY, INTERRUPTED = 0, 2, 3, 130
EXIT_CODES = """exit codes:
  0    success
  2    the request is at fault; one line on stderr says what was expected
  3    the fit ended, but not well (its status is not "converged"); what was
       found is still printed and written
  130  interrupted (Ctrl-C); the fit so far, if any, is printed and written
"""


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line for the user."""


class FitError(Exception):
    """A fit came to no result that could be shown; the message is one line for the user."""


def code_of(status: Status) -> int:
    """The exit code for the end of a fit."""
    if status is Status.INTERRUPTED:
        return INTERRUPTED
    return SUCCESS if status is Status.CONVERGED else ENDED_BADLY


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
