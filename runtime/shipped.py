"""What a compilation left on disk, beside what it came from, and how to ask it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftc.graph.program import Program
from ftc.graph.signature import format_spec
from ftc.graph.sources.tokenizer import tokenizer

from .text import takes_text

_TEXTS = {
    "feature-extraction": ("A man is eating.", "Someone has lunch."),
    "masked-lm": ("Paris is the {mask} of France.",),
    "pretraining": ("Paris is the {mask} of France.",),
    "causal-lm": ("The capital of France is",),
    "sequence-classification": ("I like it.",),
    "token-classification": ("Ada lives in London.",),
}
"""An example of what each task is asked."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """Sizes on disk, and a command that runs.

    Attributes:
        source_bytes: of the files that hold the source's weights; None where the source
            is no file here (a hub id, a module).
        files: bytes of each file of the bundle, but for what describes it
            (``ftc.json`` and ``report.json``).
        command: asks the bundle something that it can answer.
        inputs: what that command's tensors have to be, ``input float32 [batch, 64]``;
            empty where it asks with text.
    """

    source_bytes: int | None
    files: Mapping[str, int]
    command: str
    inputs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe_shipped(source: Any, program: Program, out: str | Path, folder: Path) -> Shipped:
    """What stands in ``folder``, which is going to be ``out``.

    Args:
        source: as the user named it.
        program: the result.
    """
    files = {p.relative_to(folder).as_posix(): p.stat().st_size
             for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip
    texts = _example(program)
    if not texts:
        inputs = tuple(f"{s.name} {format_spec(s)}" for s in program.signature.inputs)
        command = f"ftc run {shlex.quote(str(out))} --input FILE.npz"
        return Shipped(_source_bytes(source), files, command, inputs)
    asked = " ".join(f'--text "{text}"' for text in texts)
    command = f"ftc run {shlex.quote(str(out))} {asked}"
    return Shipped(_source_bytes(source), files, command, ())


def _example(program: Program) -> tuple[str, ...]:
    """Texts that the program can be asked; none where it takes tensors."""
    texts = _TEXTS.get(program.signature.task, ())
    found = tokenizer(program) if texts and takes_text(program.signature) else None
    if found is None:
        return ()
    if "{mask}" in texts[0] and found.mask_token is None:
        return ()
    return tuple(text.format(mask=found.mask_token) for text in texts)


def _source_bytes(source: Any) -> int | None:
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) or None
