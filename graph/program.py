"""A program: one captured model, its weights, its interface and its history.

The module is the only graph and the only weights. Facts that can be read off
the graph are not kept beside it: trainability is ``requires_grad``, a stage is
``node.meta["custom"]``, provenance is ``node.meta["provenance"]``, and what is
quantized is what a quantized operator reads.

The graph has a flat calling convention: tensors in the order of
``signature.inputs``, a tuple of tensors in the order of ``signature.outputs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .signature import Signature


@dataclass(frozen=True, slots=True)
class Drift:
    """Measured difference between two programs on the same inputs.

    Attributes:
        relative: ``|a - b| / |a|`` in the Frobenius norm, the worst of the outputs.
        max_abs: the largest elementwise difference.
        cosine_mean, cosine_min: cosine similarity along the last axis.
        inputs: what they were measured on, in words.
    """

    relative: float
    max_abs: float
    cosine_mean: float
    cosine_min: float
    inputs: str = "random"


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did to a program.

    Attributes:
        spec: the pass's text form.
        effect: its promise (``exact``, ``approximate``, ``interface``, ``annotation``).
        modified: rewrites made.
        provides: facts that hold from here on (``canonical``, ``quantized``).
        drift: measured against the program before it; None for an annotation.
        parameters, bytes, operations: of the program after it; operations in
            multiply-adds at the signature's default sizes.
        seconds: wall time of the pass without its verification.
        notes: what it chose and why, one sentence each.
        fingerprint: hash of the printed graph after it.
    """

    spec: str
    effect: str
    modified: int
    provides: tuple[str, ...]
    drift: Drift | None
    parameters: int
    bytes: int
    operations: int
    seconds: float
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """The pass's name: its text form without options."""
        return self.spec.partition("{")[0]


@dataclass(frozen=True, slots=True)
class Program:
    """A captured model plus facts. Immutable: a pass returns another program.

    Attributes:
        module: graph and weights; parameters keep the model's own names.
        signature: inputs and outputs.
        ties: sets of parameter names that share one tensor; the graph reads one
            name of each set, the others exist for checkpoints.
        history: what has been done, oldest first.
        assets: folder with the tokenizer's and configuration's files, if any.
        notes: what capture had to decide, one sentence each.
    """

    module: fx.GraphModule
    signature: Signature
    ties: tuple[frozenset[str], ...] = ()
    history: tuple[PassRecord, ...] = ()
    assets: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph of the module."""
        return self.module.graph

    @property
    def facts(self) -> frozenset[str]:
        """Everything the passes so far provide."""
        return frozenset(fact for record in self.history for fact in record.provides)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by name, each storage once."""
        yield from self.module.named_parameters()
        yield from self.module.named_buffers()

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer called ``name``."""
        value: Any = self.module
        for part in name.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor), name
        return value

    def with_ties(self, names: Iterable[str]) -> frozenset[str]:
        """``names``, and every other name of the tensors that they name."""
        chosen = frozenset(names)
        return chosen.union(*(tied for tied in self.ties if tied & chosen))

    def lost_ties(self) -> tuple[frozenset[str], ...]:
        """Ties of which no name exists any more, whole or quantized."""
        names = {name for name, _ in self.tensors()}
        return tuple(tie for tie in self.ties
                     if names.isdisjoint(tie | {f"{name}.quantized" for name in tie}))  # fmt: skip

    def __call__(
        self, inputs: Mapping[str, Tensor] | None = None, **more: Tensor
    ) -> dict[str, Tensor]:
        """Runs the graph.

        Args:
            inputs: tensors by input name; keyword arguments are added to it.

        Returns:
            Tensors by output name.
        """
        flat = self.signature.bind({**(inputs or {}), **more})
        outputs = self.module(*flat)
        return dict(zip(self.signature.output_names, outputs, strict=True))

    def clone(self) -> Program:
        """A program with its own structure and ``requires_grad`` on the same tensors.

        It costs no weights: a search can hold hundreds of clones. Whoever writes
        to weights in place takes a storage copy first.
        """
        return replace(self, module=_clone_module(self.module))


def build_module(tensors: Mapping[str, Tensor], graph: fx.Graph) -> fx.GraphModule:
    """A graph module that holds ``tensors`` under their dotted names and runs ``graph``.

    Args:
        tensors: ``nn.Parameter`` for parameters, plain tensors for buffers.
        graph: its ``get_attr`` targets must be keys of ``tensors``.
    """
    root = nn.Module()
    for name, tensor in tensors.items():
        attach(root, name, tensor)
    module = LazyModule(root, graph, class_name="Program")
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in tensors.keys() - read:  # which a graph module leaves behind
        attach(module, name, tensors[name])
    return module


class LazyModule(fx.GraphModule):
    """A graph module that is compiled when it first runs.

    A pipeline clones a program for every pass, and most clones are rewritten
    before they run: compiling them then too is half the cost of a clone.
    """

    def recompile(self) -> Any:
        """Forgets the compiled code; the next call compiles the graph as it is then."""
        self.__dict__.pop("_code", None)
        own = type(self)  # torch.fx makes a class for every graph module
        for name in ("forward", "__call__"):
            if name in vars(own):
                delattr(own, name)

    def forward(self, *args: Any) -> Any:
        """Compiles the graph, then runs it."""
        super().recompile()
        return type(self).forward(self, *args)

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        if "_code" not in self.__dict__:
            super().recompile()
        return super().code

    def __str__(self) -> str:
        _ = self.code  # what is printed
        return super().__str__()


def attach(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers ``tensor`` on ``root`` under a dotted name, making modules on the way."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def detach(root: nn.Module, name: str) -> None:
    """Removes the tensor called ``name`` and every module that is empty without it."""
    *path, leaf = name.split(".")
    owners = [root]
    for part in path:
        owners.append(getattr(owners[-1], part))
    delattr(owners[-1], leaf)
    for owner, child, part in zip(owners[-2::-1], owners[:0:-1], path[::-1], strict=True):
        if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            return
        delattr(owner, part)


def _clone_module(module: fx.GraphModule) -> fx.GraphModule:
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[name] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    tensors.update(module.named_buffers())
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    with torch.no_grad():
        output = graph.graph_copy(module.graph, copied)
    graph.output(output)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return build_module(tensors, graph)
