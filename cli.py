"""The command line: finds a command by its name and runs it.

Each command is a file in :mod:`ftc.runtime.commands`. Exit status: 0 done, 1 a
promise or a budget was broken, 2 the call was wrong, 70 a bug in ftc, 130
interrupted. A user's mistake never shows a traceback.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

from ftc.graph.errors import UsageError, nearest
from ftc.runtime.commands import NAMES
from ftc.runtime.exit import run_command


class Commands(click.Group):
    """The commands by name, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the help."""
        return list(NAMES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command called ``name``."""
        if name not in NAMES:
            return None
        found: click.Command = getattr(import_module(f"ftc.runtime.commands.{name}"), name)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Refuses an unknown command with the nearest one."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in NAMES:
            raise UsageError(f"no command is called {name!r}", fix=nearest(name, NAMES))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("ftc"), prog_name="ftc")
def ftc() -> None:
    """The fine-tune compiler: capture a model, rewrite it, prove it, ship it."""


def main() -> None:
    """The entry point of ``ftc``."""
    sys.exit(run_command(ftc, sys.argv[1:]))


if __name__ == "__main__":
    main()
