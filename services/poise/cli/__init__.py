"""The `poise` command."""

from poise.cli.commands import main

__all__ = ["main"]
