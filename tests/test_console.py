"""What is written to a terminal: widths, blanks, numbers as people read them."""

from __future__ import annotations

import io
import re

import pytest

from ftc.graph.words import plural
from ftc.runtime import console
from ftc.runtime.console import table


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("columns", [60, 80])
def test_lines_fit_and_end_where_their_text_does(
    stream: type[io.StringIO], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", file := stream())
    made = table("name", "[bold]what[/]", left=2)
    made.add_row("a", "[red]some words[/] that are wrapped at the end of a line " * 3)
    made.add_row("b", "few")
    console.stdout().print(made)
    console.stdout().print("[bold]a line that is wrapped too[/] " * 9)
    written = file.getvalue()
    assert ("\x1b[" in written) == (stream is Terminal)
    lines = re.sub(r"\x1b\[[\d;]*m", "", written).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert columns - 20 < max(map(len, lines)) <= columns
    assert "b     few" in lines  # blanks within a line stay


def test_without_a_terminal_a_line_is_of_usual_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert console.stdout().width == 120


def test_numbers_agree_with_their_nouns() -> None:
    assert plural(1, "text") == "1 text" and plural(1234, "text") == "1,234 texts"
    assert plural(2, "entry", "entries") == "2 entries" and plural(0, "row") == "0 rows"
