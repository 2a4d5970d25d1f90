"""Exit statuses of every program: `poise`, `python -m poise.<service>` and the training loop.

The local supervisor and the chart's Job (through its podFailurePolicy) decide by them whether to start a program again.
"""

from __future__ import annotations

from poise.errors import Misconfigured, PoiseError

OK = 0
"""It did what it was asked for."""
FAILED = 1
"""It failed, and may succeed when it is started again."""
WRONG_SETTINGS = 2
"""It fails again until somebody changes an option, a setting, or the file, model or service that a setting names."""
INTERRUPTED = 130
"""A signal ended it; started again, it resumes."""
OUTPUT_CLOSED = 141
"""Nothing reads its output any more: the status that a shell shows for a process that SIGPIPE killed."""


def exit_reason(error: BaseException) -> str:
    """Return what to say of an error that ends a program: what is wrong, and what to do about it."""
    remedy = error.remedy if isinstance(error, PoiseError) else ""
    return ". ".join(part for part in ((str(error) or type(error).__name__).rstrip("."), remedy) if part)


def exit_status(error: BaseException) -> int:
    """Return the status of a program that an error ends."""
    return WRONG_SETTINGS if isinstance(error, Misconfigured) else FAILED
