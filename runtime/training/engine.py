"""Engines: where gradients are computed.

A trainer asks an engine for gradients of whole steps and for sums over
evaluation batches; it never sees a module, so an engine may spread data over
processes, shard parameters, or cut the graph into stages. What is saved goes
through :meth:`Engine.whole` and :meth:`Engine.part`, so that a checkpoint does
not depend on the engine that wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ftc.graph import shapes
from ftc.graph.errors import UsageError
from ftc.graph.fold import Folded, fold
from ftc.graph.program import Program
from ftc.runtime.torch_engine import torch_device

from .modules import in_mode, move, running_buffers, trainable
from .norm import scale_to
from .objectives.base import Batch, Objective, Scene, hidden_name

Precision = Literal["fp32", "bf16"]


class Engine(Protocol):
    """Computes gradients of a program's trainable parameters.

    Attributes:
        rank, size: which of how many processes this is, among those that see different data.
        process: number of this process among all.
        main: whether this process writes files and talks.
        names: of all that training changes, in all processes.
        notes: how the program was cut, one sentence each.
    """

    rank: int
    size: int
    process: int
    main: bool
    names: frozenset[str]
    notes: tuple[str, ...]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """This process's part of what learns, by the program's names."""
        ...

    def buffers(self) -> Mapping[str, Tensor]:
        """Buffers that training changes, by name."""
        ...

    def gradients(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradients of one step to ``.grad``.

        Args:
            batches: of the step; with several processes, this one's part of each.

        Returns:
            Each part of the loss, the mean over the step in all processes.
        """
        ...

    def clip(self, most: float) -> float:
        """Scales all gradients so that their norm is at most ``most``; returns their norm."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """The mean of each part of the loss, and the sums of the metrics, of all processes."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any process says so; called by every process."""
        ...

    def each(self, value: Any) -> list[Any]:
        """What each process has, by its number; called by every process."""
        ...

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from those of the shapes of this process's parts.

        Args:
            tensors: by any name; every process calls, with what it has.

        Returns:
            On the main process those of all processes.
        """
        ...

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        ...

    def finish(self) -> None:
        """The program's own tensors hold the result, on the CPU, from here on."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine computes.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``.
        precision: ``bf16`` computes products in bfloat16 (autocast); weights and loss stay float32.
        gradient_checkpointing: keep only the inputs of each layer, and compute the rest again.
        compile: through torch.compile, once for all shapes.
    """

    device: str = "cpu"
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False

    def check(self) -> None:
        """Refuses what this machine has not, or does thirty times slower.

        Raises:
            UsageError: with the fix.
        """
        device = torch_device(self.device)
        if self.compile and self.gradient_checkpointing:
            raise UsageError("torch.compile does not take layers that are computed again",
                             fix="leave out --compile, or --gradient-checkpointing")  # fmt: skip
        if self.precision == "bf16" and device.type == "cpu" and not _has_bf16():
            raise UsageError("this processor has no bfloat16 arithmetic: training would be about "
                             "30 times slower", fix="--precision fp32")  # fmt: skip


class OneProcess:
    """One process on one device.

    Args:
        program: what is trained; its tensors are moved to the device and written to.
        objective: gives the loss.
        scene: what the objective may know.
        options: how to compute.

    Raises:
        UsageError: for checkpointing on a program without layers.
    """

    rank, size, process, main = 0, 1, 0, True
    notes: tuple[str, ...] = ()
    _narrowed = True

    def __init__(self, program: Program, objective: Objective, scene: Scene,
                 options: EngineOptions) -> None:  # fmt: skip
        options.check()
        if shapes.fake_mode(program.graph) is None:  # once for both modes, of tensors on the CPU
            shapes.propagate(program.module, program.signature)
        self._program, self._objective, self._scene = program, objective, scene
        self._options, self._device = options, torch.device(options.device)
        move(program, self._device)
        observed = objective.observed(program)
        self._names = (*program.signature.output_names, *map(hidden_name, range(len(observed))))
        self._training = self._prepared(self._in_mode(training=True), options)
        self._evaluating = self._in_mode(training=False).module
        self._parameters = trainable(program)
        self.names = frozenset((*self._parameters, *running_buffers(program)))

    def _in_mode(self, *, training: bool) -> Program:
        observed = self._objective.observed(self._program)
        return in_mode(self._program, training=training, observed=observed, narrowed=self._narrowed)

    def _prepared(self, program: Program, options: EngineOptions) -> Any:
        """What runs when it learns."""
        whole = Folded(program.module, ())
        return prepare(fold(program) if options.gradient_checkpointing else whole, options)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name."""
        return self._parameters

    def buffers(self) -> Mapping[str, Tensor]:
        """Running statistics, by name."""
        return {name: self._program.tensor(name) for name in running_buffers(self._program)}

    def gradients(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradients of the mean over ``batches`` to ``.grad``; the parts of the loss."""
        totals = Counter[str]()
        for batch in batches:
            totals.update(batch.counts)
        found: dict[str, Tensor] = {}
        for batch in batches:
            for name, part in self._backward(batch.to(self._device), totals).items():
                found[name] = found[name] + part if name in found else part
        return {name: float(part) for name, part in found.items()}

    def _backward(self, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        parts = self._losses(self._training, batch)[1]
        means = {name: part / max(totals[name], 1) for name, part in parts.items()}
        torch.stack(list(means.values())).sum().backward()  # type: ignore[no-untyped-call]
        return {name: mean.detach() for name, mean in means.items()}

    def clip(self, most: float) -> float:
        """Scales gradients to a norm of at most ``most``."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return scale_to(gradients, gradients, most)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the loss's parts and sums of the metrics, in eval mode."""
        losses, counts, sums = self._sums(self._evaluating, batches)
        return {name: losses[name] / max(counts[name], 1) for name in losses}, dict(sums)

    def _sums(self, module: Any, batches: Iterable[Batch]) -> tuple[Counter[str], ...]:
        """Sums of losses, their terms, and metrics; batches without examples are only run."""
        losses, counts, sums = Counter[str](), Counter[str](), Counter[str]()
        with torch.no_grad():
            for each in batches:
                batch = each.to(self._device)
                outputs, parts = self._losses(module, batch)
                if batch.examples:
                    losses.update({name: float(part) for name, part in parts.items()})
                    counts.update(batch.counts)
                    sums.update(self._objective.measure(outputs, batch, self._scene))
        return losses, counts, sums

    def agree(self, flag: bool) -> bool:
        """What it says itself."""
        return flag

    def each(self, value: Any) -> list[Any]:
        """What it has itself."""
        return [value]

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors themselves."""
        return dict(tensors)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The tensor itself."""
        return whole

    def finish(self) -> None:
        """Moves the program's tensors back to the CPU."""
        move(self._program, torch.device("cpu"))

    def _losses(self, module: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs by name, and the summed parts of the loss."""
        with autocasting(self._options, self._device):
            values = module(*self._program.signature.bind(batch.inputs))
        outputs = dict(zip(self._names, values, strict=True))
        return outputs, self._objective.losses(outputs, batch, self._scene)


def autocasting(options: EngineOptions, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which programs run at the precision of ``options``."""
    if options.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def prepare(folded: Folded, options: EngineOptions, *, optional: bool = False) -> Any:
    """A module as the options have it: layers computed again, compiled.

    Args:
        folded: its blocks are computed again.
        options: what is asked for.
        optional: do without blocks, as a stage of a cut program may.

    Raises:
        UsageError: for checkpointing on a program without layers.
    """
    module: Any = folded.module
    if options.gradient_checkpointing:
        if not folded.blocks and not optional:
            raise UsageError("no layers were found whose activations could be computed again",
                             fix="leave --gradient-checkpointing out")  # fmt: skip
        for path in folded.blocks:
            _recompute(module.get_submodule(path))
    if not options.compile:
        return module
    _ = module.code  # compiled by fx before torch.compile looks at it
    return torch.compile(module, dynamic=True)


def _recompute(block: nn.Module) -> None:
    """Has ``block`` keep its inputs only, and run again when gradients are computed."""
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any) -> Any:
        return type(block).forward(block, *args)  # which a lazy module exchanges when it compiles

    def forward(*args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False)

    block.forward = forward  # type: ignore[method-assign]


def _has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
