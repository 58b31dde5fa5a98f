"""What runs a program: its graph in torch, or its ``model.onnx`` in onnxruntime.

Both are called with tensors by name and answer with tensors by name, so that
everything above (embedding, generating, evaluating, measuring) is written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ftc.graph.bundle import is_bundle, load_bundle
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.words import plural

EngineName = Literal["onnx", "torch"]
MODEL = "model.onnx"


class Engine(Protocol):
    """Runs one program.

    Attributes:
        program: for its signature and its tokenizer.
        label: what runs it, in words: engine, version, threads.
    """

    @property
    def program(self) -> Program:
        """What runs."""
        ...

    @property
    def label(self) -> str:
        """What runs it."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        ...


@dataclass(frozen=True)
class TorchEngine:
    """The graph in torch, without gradients."""

    program: Program

    @property
    def label(self) -> str:
        """``torch 2.13.0, 2 threads``"""
        version = torch.__version__.split("+")[0]
        return f"torch {version}, {plural(torch.get_num_threads(), 'thread')}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name.

        Raises:
            UsageError: for inputs that the program does not run on.
        """
        try:
            with torch.no_grad():
                return self.program(inputs)
        except (RuntimeError, IndexError, ValueError) as error:
            raise UsageError(
                f"the program does not run on these inputs: {str(error).splitlines()[0]}",
                where=", ".join(f"{name} {list(t.shape)}" for name, t in inputs.items()),
                fix="give sizes within the model's limits: ftc inspect shows them",
            ) from error


class OnnxEngine:
    """An ONNX file in onnxruntime on the CPU.

    Args:
        program: the program that the file was lowered from.
        path: the file.
        threads: how many; by default those that torch has.
    """

    def __init__(self, program: Program, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        from .session import OnnxSession

        used = threads or torch.get_num_threads()
        self.program = program
        self.session: Any = OnnxSession(path, threads=used)
        if set(self.session.output_names) != set(program.signature.output_names):
            raise BundleError(
                f"{path} gives {', '.join(self.session.output_names)}, and the program beside it "
                f"{', '.join(program.signature.output_names)}",
                fix="make the bundle again",
            )
        self.label = f"onnxruntime {onnxruntime.__version__}, {plural(used, 'thread')}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        self.program.signature.bind(inputs)
        found: dict[str, Tensor] = self.session(inputs)
        return found


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads in torch, within."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_threads(threads: int | None) -> None:
    """Uses this many threads in torch, and from now on as the default of onnxruntime.

    Raises:
        UsageError: for a number that makes no sense.
    """
    if threads is None:
        return
    if not 1 <= threads <= 4 * (os.cpu_count() or 1):
        cores = os.cpu_count() or 1
        raise UsageError(
            f"--threads {threads}: this machine has {cores} cores",
            fix=f"--threads {cores}, or any number from 1 to {4 * cores}",
        )
    torch.set_num_threads(threads)


def open_engine(
    source: str, engine: EngineName | None = None, *, task: str | None = None, trust: bool = False
) -> Engine:
    """Opens what the user named.

    Args:
        source: a bundle, or a model that can be captured (in torch only).
        engine: by default onnxruntime for a bundle that has ``model.onnx``, else torch.
        task, trust: as for capture.

    Raises:
        UsageError: for onnxruntime without a ``model.onnx``.
        SourceError, CaptureError, BundleError: as capture does.
    """
    path = Path(source).expanduser()
    if not is_bundle(path):
        if engine == "onnx":
            raise UsageError(
                f"{source} is no bundle: there is no {MODEL} to run",
                fix=f"ftc compile {source} --passes cleanup -o OUT, or --engine torch",
            )
        return TorchEngine(capture(source, task=task, trust=trust))
    program = load_bundle(path)
    lowered = path / MODEL
    if engine == "torch" or (engine is None and not lowered.is_file()):
        return TorchEngine(program)
    if not lowered.is_file():
        raise UsageError(
            f"{source} has no {MODEL}", fix=f"ftc export {source} -o FILE.onnx, or --engine torch"
        )
    return OnnxEngine(program, lowered)
