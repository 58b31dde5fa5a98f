"""The terminal: tables on stdout, progress and errors on stderr, numbers as people read them."""

from __future__ import annotations

import json as encoder
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ftc.graph.errors import FtcError

_PIPE_WIDTH = 120
_LINE_END = re.compile(r"(?: |\x1b\[[\d;]*m)+(?=\r?\n)")  # blanks, and colours between them
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def stdout() -> Console:
    """Where results go: as wide as the terminal; in a pipe ``COLUMNS``, or 120, columns."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Where progress and errors go."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    asked = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    width = None if asked else _PIPE_WIDTH  # None: rich asks the terminal, or COLUMNS
    file: Any = _Trimmed(stream)
    return _Console(file=file, width=width, highlight=False, soft_wrap=False)


class _Console(Console):
    """A console that says where nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Not rich's own answer, which is to end with the status of a failure."""
        raise BrokenPipeError


class _Trimmed:
    """A stream whose lines end where their text does: rich fills the last column with blanks."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        trimmed = _LINE_END.sub(lambda found: found[0].replace(" ", ""), text)
        return int(self._stream.write(trimmed))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """A line on stderr that says what runs; on a terminal only, and gone once there is a result.

    Args:
        enabled: show it if stderr is a terminal.
    """

    def __init__(self, enabled: bool = True) -> None:
        console = stderr()
        self._status = console.status("") if enabled and console.is_terminal else None

    def __call__(self, text: str) -> None:
        """Shows ``text``."""
        if self._status is not None:
            self._status.update(escape(text))
            self._status.start()

    def stop(self) -> None:
        """Takes the line away: what follows is written to the same terminal."""
        if self._status is not None:
            self._status.stop()


class Output:
    """Where a command's result goes: JSON, or a table; and what runs until then.

    Attributes:
        json: whether JSON was asked for.
        say: shows what runs.
    """

    def __init__(self, json: bool) -> None:
        self.json, self.say = json, Progress(enabled=not json)

    def show(self, result: Any, render: Callable[..., None], **options: Any) -> None:
        """Prints ``result``."""
        if self.json:
            self.data(result.to_dict())
        else:
            self.print(render, result, **options)

    def data(self, value: Any) -> None:
        """Prints plain values as JSON."""
        self.write(encoder.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def print(self, render: Callable[..., None], *values: Any, **options: Any) -> None:
        """Prints a table."""
        self.say.stop()
        render(*values, stdout(), **options)

    def write(self, text: str) -> None:
        """Writes text at once."""
        self.say.stop()
        sys.stdout.write(text)
        sys.stdout.flush()


def print_error(error: FtcError) -> None:
    """``PreconditionError: what``, then where and fix, red on a terminal; never wrapped or cut."""
    text = Text(f"{type(error).__name__}: ", style="bold red")
    text.append(error.what, style="red")
    if error.where:
        text.append(f"\n  {error.where}", style="default")
    if error.fix:
        text.append("\n  fix: ", style="bold green").append(error.fix, style="default")
    stderr().print(text, soft_wrap=True)


def table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """A plain table: the first ``left`` columns are text, the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None,
                 header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))  # fmt: skip
    for place, name in enumerate(columns):
        text = place < left
        made.add_column(name, justify="left" if text else "right", no_wrap=not text,
                        overflow="fold", ratio=None)  # fmt: skip
    return made


def count(number: float | None) -> str:
    """``22.7 M``; empty for None."""
    if number is None:
        return ""
    for size, prefix in _PREFIXES:
        if number >= 0.9995 * size:  # what rounds up to 1,000 of the next smaller
            return f"{_three(number / size)} {prefix}"
    return f"{number:.3g}" if number % 1 else f"{number:g}"


def megabytes(size: float) -> str:
    """``90.9``, in millions of bytes; small sizes with more digits."""
    number = size / 1e6
    return f"{number:,.1f}" if number >= 0.1 else f"{number:.2g}"


def duration(seconds: float) -> str:
    """``1.2 s``, ``3.40 ms``, ``56.0 us``."""
    size, unit = _unit(seconds)
    return f"{_three(seconds / size)} {unit}"


def spread(median: float, low: float, high: float) -> str:
    """``3.40 ms (3.21–3.55)``: a median in seconds and its quartiles, in the median's unit."""
    size, _ = _unit(median)
    return f"{duration(median)} ({_three(low / size)}–{_three(high / size)})"


def _unit(seconds: float) -> tuple[float, str]:
    if seconds >= 1:
        return 1.0, "s"
    return (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")


def _three(number: float) -> str:
    """Three digits: ``22.0``, ``235``, ``1.20``."""
    return f"{number:#.3g}".rstrip(".") if number < 999.5 else f"{number:,.0f}"


def small(number: float) -> str:
    """``0``, ``3.1e-07`` or ``0.0123``: an error with two or three digits."""
    if number == 0:
        return "0"
    return f"{number:.1e}" if number < 1e-3 else f"{number:.3g}"


def format_sizes(sizes: Mapping[str, int]) -> str:
    """``batch=8, sequence=128``"""
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "its fixed shape"


def cosine(number: float) -> str:
    """Yellow where rows point elsewhere, red where they do so clearly."""
    bounds = ((0.9, "red"), (0.98, "yellow"))
    colour = next((colour for bound, colour in bounds if number < bound), "default")
    return f"[{colour}]{number:.4f}[/]"
