"""Pictures on disk: matplotlib when it is there, and a file that is whole or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftc.graph.bundle import cannot_write
from ftc.graph.errors import UsageError

_PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuses a picture that could not be written, before the time for what it shows is spent.

    Raises:
        UsageError: for another kind of file, a missing folder, or without matplotlib.
    """
    if path.suffix not in _PICTURES:
        raise UsageError(f"{path} is no picture", fix=f"name it .{_PICTURES[0][1:]}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", fix=f"mkdir -p {path.parent}")
    figure_class()


def figure_class() -> Any:
    """matplotlib's class of figures.

    Raises:
        UsageError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib", fix="pip install 'ftc[pictures]'") from None
    return Figure


def save_picture(figure: Any, path: Path) -> None:
    """Writes ``figure`` in one step; an old picture stays where that fails.

    Raises:
        WriteError: when the disk is full.
    """
    draft = path.with_name(f".{path.stem}.ftc{path.suffix}")
    try:
        figure.savefig(draft, dpi=150, metadata={"Software": None})
        draft.replace(path)
    except OSError as error:
        raise cannot_write(error, path) from error
    finally:
        draft.unlink(missing_ok=True)
