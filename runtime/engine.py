"""What runs a program: its graph in torch, or its ``model.onnx`` in onnxruntime.

Both are called with tensors by name and answer with tensors by name, so that
everything above (embedding, generating, evaluating, measuring) is written once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ftc.graph.bundle import is_bundle, load_bundle
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.words import plural

from .compiled import compile_errors

EngineName = Literal["onnx", "torch"]
Device = Literal["cpu", "cuda"]
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
    """The graph in torch, without gradients.

    Attributes:
        program: what runs; its tensors are on ``device``.
        device: where it runs; inputs are moved there, and outputs back.
        compiled: through torch.compile, once for all shapes.
    """

    program: Program
    device: str = "cpu"
    compiled: bool = False

    @cached_property
    def _run(self) -> Callable[..., Any]:
        module = self.program.module
        if not self.compiled:
            return module
        _ = module.code  # compiled by fx before torch.compile looks at it
        compiled: Callable[..., Any] = torch.compile(module, dynamic=True)
        return compiled

    @property
    def label(self) -> str:
        """``torch 2.13.0, 2 threads``"""
        version = torch.__version__.split("+")[0] + (", compiled" if self.compiled else "")
        if self.device != "cpu":
            return f"torch {version}, {torch.cuda.get_device_name(self.device)}"
        return f"torch {version}, {plural(torch.get_num_threads(), 'thread')}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name.

        Raises:
            UsageError: for inputs that the program does not run on, or one that torch.compile
                cannot compile here.
        """
        signature = self.program.signature
        try:
            with torch.no_grad(), compile_errors(self.compiled):
                given = (tensor.to(self.device) for tensor in signature.bind(inputs))
                made = self._run(*given)
                return {n: t.cpu() for n, t in zip(signature.output_names, made, strict=True)}
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
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self, program: Program, path: Path, threads: int | None = None, device: Device = "cpu"
    ) -> None:
        import onnxruntime

        from .session import OnnxSession

        used = threads or torch.get_num_threads()
        self.program = program
        self.session: Any = OnnxSession(path, threads=used, device=device)
        if set(self.session.output_names) != set(program.signature.output_names):
            raise BundleError(
                f"{path} gives {', '.join(self.session.output_names)}, and the program beside it "
                f"{', '.join(program.signature.output_names)}",
                fix="make the bundle again",
            )
        where = plural(used, "thread") if device == "cpu" else device
        self.label = f"onnxruntime {onnxruntime.__version__}, {where}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        self.program.signature.bind(inputs)
        found: dict[str, Tensor] = self.session(inputs)
        return found


def torch_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: for one that this machine has not.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("this machine has no GPU that torch can use", fix="--device cpu")
    return device


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
    source: str, engine: EngineName | None = None, *, task: str | None = None, trust: bool = False,
    device: Device = "cpu", compiled: bool = False,
) -> Engine:  # fmt: skip
    """Opens what the user named.

    Args:
        source: a bundle, or a model that can be captured (in torch only).
        engine: by default onnxruntime for a bundle that has ``model.onnx``, else torch.
        task, trust: as for capture.
        device: where it runs.
        compiled: in torch, through torch.compile.

    Raises:
        UsageError: for onnxruntime without a ``model.onnx``, ``compiled`` without torch, or a
            device that is not there.
        SourceError, CaptureError, BundleError: as capture does.
    """
    path = Path(source).expanduser()
    if not is_bundle(path):
        if engine == "onnx":
            raise UsageError(
                f"{source} is no bundle: there is no {MODEL} to run",
                fix=f"ftc compile {source} --passes cleanup -o OUT, or --engine torch",
            )
        return _torch_engine(capture(source, task=task, trust=trust), device, compiled)
    program = load_bundle(path)
    lowered = path / MODEL
    if engine == "torch" or (engine is None and not lowered.is_file()):
        return _torch_engine(program, device, compiled)
    if compiled:
        raise UsageError(f"{MODEL} runs in onnxruntime", fix="--engine torch, or without --compile")
    if not lowered.is_file():
        raise UsageError(
            f"{source} has no {MODEL}", fix=f"ftc export {source} -o FILE.onnx, or --engine torch"
        )
    return OnnxEngine(program, lowered, device=device)


def _torch_engine(program: Program, device: Device, compiled: bool) -> TorchEngine:
    """The engine, with the program's tensors where it runs."""
    place = torch_device(device)
    if place.type != "cpu":
        program = program.clone()
        program.module.to(place)
    return TorchEngine(program, device, compiled)
