"""The `rosaq` command."""

from rosaq.cli.commands import main

__all__ = ["main"]
