"""The two exceptions that end a run on purpose; any other exception is a bug and shows its trace."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right.

    The message says what is wrong, where, and how to fix it, in one or two lines. The command line prints it
    without a traceback and exits with code 1.
    """


class CheckFailed(Exception):
    """The program's own check of its result failed, so nothing was written (exit code 3)."""
