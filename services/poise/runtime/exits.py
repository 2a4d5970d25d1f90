"""Exit statuses that mean the same for every program, so that a supervisor knows what to do about them."""

from __future__ import annotations

from poise.errors import Misconfigured, PoiseError

EXIT_OK = 0
EXIT_FAILED = 1
"""Starting again may help."""
EXIT_MISCONFIGURED = 2
"""The settings, or the model that they name, cannot work: starting again does not help."""
EXIT_INTERRUPTED = 130
"""A signal ended it."""
EXIT_OUTPUT_CLOSED = 141
"""Nobody reads its output any more: what a shell shows of a process that SIGPIPE killed."""


def exit_reason(error: BaseException) -> str:
    """Return what to say of an error that ends a program: what is wrong, and what to do about it."""
    remedy = error.remedy if isinstance(error, PoiseError) else ""
    return ". ".join(part for part in ((str(error) or type(error).__name__).rstrip("."), remedy) if part)


def exit_status(error: BaseException) -> int:
    """Return the status of a program that an error ends."""
    return EXIT_MISCONFIGURED if isinstance(error, Misconfigured) else EXIT_FAILED
