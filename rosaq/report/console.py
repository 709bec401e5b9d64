"""Where tables are printed: wide enough for all of their columns, in a pipe and in a narrow terminal too."""

from __future__ import annotations

from rich.console import Console

_LEAST = 120  # characters; rich cuts off what does not fit into what it believes is there


def wide_console() -> Console:
    """A console on stdout of at least so many characters a line, to which [a] is no markup: paths have brackets."""
    console = Console(markup=False)
    return console if console.width >= _LEAST else Console(width=_LEAST, markup=False)
