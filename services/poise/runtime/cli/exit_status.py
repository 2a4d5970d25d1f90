"""Exit statuses of every program: `poise`, `python -m poise.<service>` and the training loop.

The local supervisor, and the chart's Job through its podFailurePolicy, use them to decide whether to restart a program.
"""

from __future__ import annotations

from poise.errors import Misconfigured, PoiseError

OK = 0
"""Success."""
FAILED = 1
"""Failure. The program may succeed when it is started again."""
WRONG_SETTINGS = 2
"""Wrong settings. The program fails again until an option, a setting, or a file that a setting names is changed."""
INTERRUPTED = 130
"""Stopped by a signal. The program resumes when it is started again."""
OUTPUT_CLOSED = 141
"""The reader of the output has exited. A shell shows this status for a process that SIGPIPE killed."""


def exit_reason(error: BaseException) -> str:
    """Return the message for an error that ends a program: the problem and the remedy."""
    remedy = error.remedy if isinstance(error, PoiseError) else ""
    return ". ".join(part for part in ((str(error) or type(error).__name__).rstrip("."), remedy) if part)


def exit_status(error: BaseException) -> int:
    """Return the exit status for an error that ends a program."""
    return WRONG_SETTINGS if isinstance(error, Misconfigured) else FAILED
