"""What ends a run."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot go on as asked. The message says why and what to do."""
