"""What ends a run."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot go on as asked. The message says why and what to do."""


class SettingsError(RunError):
    """The settings do not fit the run's folder or the services: starting again does not help."""
