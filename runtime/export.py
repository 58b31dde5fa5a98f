"""``ftc export``: a program as an ONNX file of its own, proven like every other."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftc.graph.bundle import cannot_write, check_parents, is_bundle
from ftc.graph.cached import start_of
from ftc.graph.errors import UsageError
from ftc.graph.program import Drift, Program
from ftc.graph.sources import capture
from ftc.graph.words import plural
from ftc.passes.context import Context

from .engine import MODEL, OnnxEngine
from .lower import Dialect, decomposed, lower, save_onnx
from .parity import check_parity


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, and how far it is from the graph."""

    source: str
    path: str
    bytes: int
    drift: Drift
    decomposed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def export(
    source: str,
    out: Path,
    *,
    force: bool = False,
    task: str | None = None,
    trust: bool = False,
    dialect: Dialect = "onnxruntime",
    progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Lowers a program again and writes the ONNX file, once onnxruntime has agreed with the graph.

    Args:
        source: a bundle, or a model that can be captured.
        out: a file ``NAME.onnx``, or a folder that gets ``model.onnx``.
        force: replace a file that is there.
        task, trust: as for capture.
        dialect: ``standard`` for standard operators only.
        progress: told what runs.

    Raises:
        UsageError: when the file exists, or stands in a bundle.
        WriteError: when the disk is full.
        FtcError: as capture, lowering and parity raise it. Nothing is written in any case.
    """
    target = _checked(out if out.suffix == ".onnx" else out / MODEL, force)
    progress(f"reading {source}")
    program = capture(source, task=task, trust=trust)
    progress("lowering to ONNX")
    model = lower(program, dialect)
    try:
        size, drift = _write(program, model, target, progress)
    except OSError as error:
        raise cannot_write(error, target) from error
    return Export(source, str(target), size, drift, decomposed(model), _notes(program))


def _notes(program: Program) -> tuple[str, ...]:
    """What whoever runs the file has to know, for the file does not say it."""
    if not program.signature.start:
        return ()
    tokens = plural(len(start_of(program).ids), "token")
    return (
        f"the prompt's {tokens} are not in the file: feed their keys and values as the first "
        "past, or let ftc run the bundle",
    )


def _checked(target: Path, force: bool) -> Path:
    check_parents(target.absolute())
    if is_bundle(target.parent):
        raise UsageError(
            f"{target.parent} is a bundle, which lists the files it has",
            fix="choose another place",
        )
    if target.exists() and not force:
        raise UsageError(f"{target} exists", fix="use --force to replace it")
    return target


def _write(
    program: Program, model: Any, target: Path, progress: Callable[[str], None]
) -> tuple[int, Drift]:
    """Writes the file, and puts it in its place once it computes what the graph does."""
    made = [folder for folder in target.parents if not folder.exists()]  # the innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}.") as scratch:
            path = Path(scratch) / target.name
            save_onnx(model, path)
            progress("comparing onnxruntime with the graph")
            ctx = Context.for_program(program)
            engine = OnnxEngine(program, path)
            outputs = [engine(probe) for probe in ctx.probes]
            expected = ctx.outputs(program)
            drift = check_parity(program, expected, outputs, ctx.probes, ctx.probe_source)
            size = 0
            for file in sorted(Path(scratch).iterdir(), key=lambda f: f == path):
                size += file.stat().st_size
                os.replace(file, target.parent / file.name)
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for folder in made:
                folder.rmdir()
        raise
    return size, drift
