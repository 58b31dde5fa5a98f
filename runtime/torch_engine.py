"""A program's graph in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.words import plural

from .compiled import compile_errors
from .spoken import Spoken
from .threads import thread_count


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

    @cached_property
    def spoken(self) -> Spoken:
        """What generation has to know of the program."""
        return Spoken.of(self.program)

    @property
    def label(self) -> str:
        """``torch 2.13.0, 2 threads``"""
        version = torch.__version__.split("+")[0] + (", compiled" if self.compiled else "")
        if self.device != "cpu":
            return f"torch {version}, {torch.cuda.get_device_name(self.device)}"
        return f"torch {version}, {plural(thread_count(), 'thread')}"

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


def torch_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: for one that this machine has not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"no device is called {name!r}", fix="--device cpu, or --device cuda")
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


def torch_engine(program: Program, device: str, compiled: bool) -> TorchEngine:
    """An engine, with the program's tensors where it runs.

    Raises:
        UsageError: for a device that is not there.
    """
    place = torch_device(device)
    if place.type != "cpu":
        program = program.clone()
        program.module.to(place)
    return TorchEngine(program, device, compiled)
