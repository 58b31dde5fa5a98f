"""The line that moves: step, loss, tokens a second, time left. On a terminal only."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ftc.runtime.console import count, stderr


class Bar:
    """A progress bar on stderr.

    Args:
        enabled: show it, if stderr is a terminal.
        total: steps of the run.
        done: of them before this process.
    """

    def __init__(self, enabled: bool, total: int, done: int = 0) -> None:
        console = stderr()
        self._bar: Any = None
        if enabled and console.is_terminal and total:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(),
                       TextColumn("loss {task.fields[loss]}"),
                       TextColumn("{task.fields[speed]} tokens/s"), TimeRemainingColumn(),
                       TextColumn("left {task.fields[note]}"))  # fmt: skip
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done, loss="", speed="",
                                            note="")  # fmt: skip
            self._bar.start()

    def step(self, done: int, loss: float, speed: float) -> None:
        """``done`` steps are done, the last with this loss, at so many tokens a second."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=f"{loss:.4f}", speed=count(speed))

    def note(self, text: str) -> None:
        """What happens between steps."""
        if self._bar is not None:
            self._bar.update(self._task, note=f"({text})" if text else "")

    def stop(self) -> None:
        """Takes the line away."""
        if self._bar is not None:
            self._bar.stop()
