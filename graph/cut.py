"""Cut: a graph becomes stages that run one after another; every name stays.

Each stage is a program of its own, on the very same Parameters under the same
names. It takes some of the program's inputs and what the stage before sends::

    stage_i(inputs_i, received_i) -> sent_i, outputs_i        received_i+1 = sent_i

A value that a later stage reads is relayed through those between, and the last
stage yields all of the program's outputs, so one stage talks to the next one
only: what pipeline engines need. Values that cost nothing are computed in each
stage that reads them (:mod:`ftc.graph.stages`), and sizes never cross: a stage
reads them off what it has. So between two layers of an encoder or a decoder one
tensor crosses. A parameter that several stages read is held by each of them:
its gradient is the sum of theirs (:func:`shared_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from . import shapes
from .program import Program, build_module
from .signature import InputSpec, OutputSpec, Signature
from .stages import annotated, carried, is_tensor, settle
from .symbols import DimensionNames

_sym_size = torch.ops.aten.sym_size.int


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a cut program.

    Attributes:
        index: its place, from 0.
        program: ``module(*inputs, *received) -> (*sent, *outputs)``, as its signature
            says; it holds only the tensors that it reads.
        inputs: names of the program's inputs that it takes.
        received: names of the values that the stage before sends, in order.
        sent: names of the values for the stage behind, in order.
        outputs: names of the program's outputs that it yields: the last stage yields all.
    """

    index: int
    program: Program
    inputs: tuple[str, ...]
    received: tuple[str, ...]
    sent: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def module(self) -> fx.GraphModule:
        """Runs the stage; on the program's Parameters."""
        return self.program.module


def cut(program: Program, stages: Mapping[fx.Node, int] | None = None) -> tuple[Stage, ...]:
    """Cuts ``program``, which is not changed but for fake values where it has none.

    Args:
        program: any; its mode and ``requires_grad`` hold for the stages.
        stages: the stage of each node, from 0; by default the annotations that
            ``partition`` left. A node without one goes with its inputs.

    Returns:
        Stages in order: one where nothing is annotated.

    Raises:
        PreconditionError: for an annotation that is no number of a stage.
    """
    if shapes.fake_mode(program.graph) is None:
        shapes.propagate(program.module, program.signature)
    own = annotated(program) if stages is None else stages
    return _Cut(program, own).stages()


def run_stages(stages: Sequence[Stage], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs stages one after another in this process; outputs by name.

    Args:
        stages: all of them, in order.
        inputs: of the program, by name.
    """
    outputs: dict[str, Tensor] = {}
    passed: dict[str, Tensor] = {}
    for stage in stages:
        made = stage.program({**{name: inputs[name] for name in stage.inputs}, **passed})
        passed = {name: made[name] for name in stage.sent}
        outputs.update((name, made[name]) for name in stage.outputs)
    return outputs


def shared_parameters(stages: Iterable[Stage]) -> dict[str, tuple[int, ...]]:
    """Parameters that several stages read, and which: there the gradient is a sum."""
    held: dict[str, list[int]] = {}
    for stage in stages:
        for name, _ in stage.module.named_parameters():
            held.setdefault(name, []).append(stage.index)
    return {name: tuple(where) for name, where in held.items() if len(where) > 1}


class _Cut:
    """Where every value is made, how far it travels, and what each stage computes."""

    def __init__(self, program: Program, own: Mapping[fx.Node, int]) -> None:
        self.program = program
        self.nodes = list(program.graph.nodes)
        self.carried = carried(program)
        kept = {node: stage for node, stage in own.items() if node in self.carried}
        self.stage = settle(self.nodes, kept, 0)
        self.count = 1 + max((self.stage[node] for node in self.carried), default=0)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.sizes = _sizes_of(self.placeholders)
        self.needed = [self._needed(index) for index in range(self.count)]
        self.last = self._last()

    def stages(self) -> tuple[Stage, ...]:
        return tuple(_build(self, index) for index in range(self.count))

    def sent(self, index: int) -> list[fx.Node]:
        """Values that travel from stage ``index`` to the next one, in order of the graph."""
        return [node for node in self.nodes
                if node in self.last and self.stage[node] <= index < self.last[node]]  # fmt: skip

    def results(self) -> tuple[fx.Node, ...]:
        values: Any = self.program.graph.output_node().args[0]
        return tuple(values)

    def local(self, node: fx.Node, index: int) -> bool:
        """Whether stage ``index`` computes ``node`` when it needs it."""
        return node not in self.carried or self.stage[node] == index

    def reads_size(self, node: fx.Node, index: int) -> bool:
        """Whether ``node`` is a size of a value made elsewhere that an input has too."""
        return (
            node.target is _sym_size
            and not (node.args[0] in self.carried and self.local(node.args[0], index))  # type: ignore[arg-type]
            and _form(node.meta[shapes.VAL]) in self.sizes
        )

    def _last(self) -> dict[fx.Node, int]:
        """The last stage that reads each carried value."""
        found: dict[fx.Node, int] = {}
        for index, needed in enumerate(self.needed):
            found.update(dict.fromkeys(needed & self.carried, index))
        return found

    def _needed(self, index: int) -> set[fx.Node]:
        """What stage ``index`` computes or reads."""
        stack = [node for node in self.carried if self.stage[node] == index]
        if index == self.count - 1:
            stack += self.results()
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                if self.local(node, index) and not self.reads_size(node, index):
                    stack += node.all_input_nodes
        return seen


def _build(cut: _Cut, index: int) -> Stage:
    """Stage ``index`` as a program."""
    graph, new = fx.Graph(), dict[fx.Node, Any]()
    needed, program = cut.needed[index], cut.program
    received = cut.sent(index - 1) if index else []
    sent = cut.sent(index)
    results = cut.results() if index == cut.count - 1 else ()
    own = [n for n in cut.nodes if n in needed and n not in received and n.op != "placeholder"]
    sizes = [node for node in own if cut.reads_size(node, index)]
    inputs = _inputs(cut, needed, received, sizes)
    for node in (*inputs, *received):
        new[node] = graph.placeholder(node.name)
    new.update(_read_sizes(graph, new, sizes))
    for node in own:
        if node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in (*sent, *results)))
    for old, copied in new.items():
        copied.meta = dict(old.meta)
    graph.output_node().meta[shapes.VAL] = tuple(n.meta[shapes.VAL] for n in (*sent, *results))
    specs = dict(zip(cut.placeholders, program.signature.inputs, strict=True))
    dims = DimensionNames(program)
    signature = replace(
        program.signature,
        inputs=(*(specs[n] for n in inputs), *(InputSpec(*_type(n, dims)) for n in received)),
        outputs=(*(OutputSpec(*_type(n, dims)) for n in sent),
                 *(program.signature.outputs if results else ())),
    )  # fmt: skip
    made = _stage_program(program, graph, signature)
    return Stage(
        index, made, tuple(specs[n].name for n in inputs), tuple(n.name for n in received),
        tuple(n.name for n in sent), program.signature.output_names if results else (),
    )  # fmt: skip


def _stage_program(program: Program, graph: fx.Graph, signature: Signature) -> Program:
    """``graph`` with those tensors of ``program`` that it reads."""
    read = {str(node.target): program.tensor(str(node.target))
            for node in graph.nodes if node.op == "get_attr"}  # fmt: skip
    ties = tuple(tie for tie in program.ties if not tie.isdisjoint(read))
    return replace(program, module=build_module(read, graph), signature=signature, ties=ties)


def _inputs(
    cut: _Cut, needed: set[fx.Node], received: Sequence[fx.Node], sizes: Sequence[fx.Node]
) -> list[fx.Node]:
    """The program's inputs that a stage takes: what it reads, and where else sizes stand."""
    taken = needed.intersection(cut.placeholders)
    known = _sizes_of([*taken, *received])
    for node in sizes:
        form = _form(node.meta[shapes.VAL])
        if form not in known:
            taken.add(cut.sizes[form][0])
            known.update(_sizes_of([cut.sizes[form][0]]))
    return [node for node in cut.placeholders if node in taken]


def _read_sizes(
    graph: fx.Graph, new: Mapping[fx.Node, fx.Node], sizes: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """A node of the new graph for each size, read off what the stage takes; one a size."""
    known = _sizes_of([old for old in new if is_tensor(old)])
    made: dict[str, fx.Node] = {}
    for node in sizes:
        form = _form(node.meta[shapes.VAL])
        if form not in made:
            source, dim = known[form]
            made[form] = graph.call_function(_sym_size, (new[source], dim))
    return {node: made[_form(node.meta[shapes.VAL])] for node in sizes}


def _sizes_of(nodes: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """Where each symbolic size stands: ``{expression: (node, dimension)}``, the first of each."""
    found: dict[str, tuple[fx.Node, int]] = {}
    for node in nodes:
        val = node.meta.get(shapes.VAL)
        for dim, size in enumerate(val.shape if isinstance(val, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                found.setdefault(_form(size), (node, dim))
    return found


def _form(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def _type(node: fx.Node, dims: DimensionNames) -> tuple[str, torch.dtype, tuple[int | str, ...]]:
    """Name, dtype and shape of a value that crosses."""
    fake = node.meta[shapes.VAL]
    shape = (
        dims.size(size) if isinstance(size, torch.SymInt) else int(size) for size in fake.shape
    )
    return node.name, fake.dtype, tuple(shape)
