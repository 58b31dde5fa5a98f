"""What runs a program: its graph in torch, or its ``model.onnx`` in onnxruntime.

Both are called with tensors by name and answer with tensors by name, so that
everything above (embedding, generating, evaluating, measuring) is written once.
To generate with onnxruntime takes no torch, which is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ftc.graph.bundle import is_bundle
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.words import plural

from .spoken import Spoken
from .threads import tell_torch, thread_count

if TYPE_CHECKING:
    from torch import Tensor

    from ftc.graph.program import Program

EngineName = Literal["onnx", "torch"]
Device = Literal["cpu", "cuda"]
MODEL = "model.onnx"
_AGAIN = "make the bundle again"


class Engine(Protocol):
    """Runs one program.

    Attributes:
        program: for its signature and its tokenizer.
        spoken: what generation has to know of it.
        label: what runs it, in words: engine, version, threads.
    """

    @property
    def program(self) -> Program:
        """What runs."""
        ...

    @property
    def spoken(self) -> Spoken:
        """What generation has to know of what runs."""
        ...

    @property
    def label(self) -> str:
        """What runs it."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        ...


class OnnxEngine:
    """An ONNX file in onnxruntime.

    Args:
        program: what the file was lowered from, or the bundle that holds both: its graph and
            weights are read when something asks for the program.
        path: the file.
        threads: how many; by default those that torch has.
        device: ``cpu`` or ``cuda``.

    Raises:
        BundleError: for a file that does not give what its program does.
    """

    def __init__(
        self, program: Program | Path, path: Path, threads: int | None = None,
        device: Device = "cpu",
    ) -> None:  # fmt: skip
        import onnxruntime

        from .session import OnnxSession

        used = threads or thread_count()
        self._source = program
        if isinstance(program, Path):
            self.spoken = Spoken.read(program.resolve(), path.name)
        else:
            self.spoken = Spoken.of(program)
        self.session: Any = OnnxSession(path, threads=used, device=device)
        if odd := self.session.misfit(self.spoken.inputs, self.spoken.outputs):
            raise BundleError(f"{path} {odd} than the program beside it", fix=_AGAIN)
        where = plural(used, "thread") if device == "cpu" else device
        self.label = f"onnxruntime {onnxruntime.__version__}, {where}"

    @cached_property
    def program(self) -> Program:
        """What the file was lowered from."""
        if not isinstance(self._source, Path):
            return self._source
        from ftc.graph.bundle import load_bundle

        found = load_bundle(self._source)
        tell_torch()  # which may have been imported for this
        return found

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        self.program.signature.bind(inputs)
        found: dict[str, Tensor] = self.session(inputs)
        return found


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
        from ftc.graph.sources import capture

        return _in_torch(capture(source, task=task, trust=trust), device, compiled)
    lowered = path / MODEL
    if engine == "torch" or (engine is None and not lowered.is_file()):
        from ftc.graph.bundle import load_bundle

        return _in_torch(load_bundle(path), device, compiled)
    if compiled:
        raise UsageError(f"{MODEL} runs in onnxruntime", fix="--engine torch, or without --compile")
    if not lowered.is_file():
        raise UsageError(
            f"{source} has no {MODEL}", fix=f"ftc export {source} -o FILE.onnx, or --engine torch"
        )
    return OnnxEngine(path, lowered, device=device)


def _in_torch(program: Program, device: Device, compiled: bool) -> Engine:
    from .torch_engine import torch_engine

    return torch_engine(program, device, compiled)
