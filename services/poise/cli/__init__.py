"""`poise`: the one command."""

from poise.cli.commands import main

__all__ = ["main"]
