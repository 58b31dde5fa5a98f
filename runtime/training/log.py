"""What a run says while it runs: JSON lines, TensorBoard, and a line that moves.

``metrics.jsonl`` has one object for each logged step, ``{"step", "epoch", "loss",
"learning_rate", "gradient_norm", "tokens_per_second"}``, and one for each
evaluation, ``{"step", "epoch", "evaluation": {...}}``. After a resume the lines
behind the checkpoint are dropped, so the file reads like that of one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftc.graph.bundle import cannot_write
from ftc.graph.errors import UsageError

Record = Mapping[str, Any]


class Log:
    """Writes records to a file, and to TensorBoard where a folder is given.

    Args:
        path: the file of JSON lines.
        step: drop records behind this step, which are about to come again.
        tensorboard: a folder, or None.

    Raises:
        UsageError: for TensorBoard where it is not installed.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: Path | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = [r for r in _read(path) if r["step"] <= step]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(map(_line, self.records)), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(tensorboard, step) if tensorboard else None

    def write(self, record: Record) -> None:
        """Adds a record."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(record).items():
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Nothing is written any more."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _read(path: Path) -> list[Record]:
    """The records of a file, but for a last line that was cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _scalars(record: Record) -> dict[str, float]:
    evaluation = record.get("evaluation")
    if evaluation is not None:
        return {f"evaluation/{name}": value for name, value in evaluation.items()}
    return {f"train/{name}": value for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))}  # fmt: skip


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "the package tensorboard is not installed",
            fix="pip install 'ftc[train]', or leave --tensorboard out",
        ) from None
    try:
        return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except OSError as error:
        raise cannot_write(error, folder) from error
