"""The sequence of a text model: its dimension, what is computed from tokens, what from places.

A model that reads tokens computes two kinds of values:

*the stream*  what depends on the tokens' embeddings: one row a token, and most of
              the work;
*places*      what depends only on sizes, masks, positions and integer tests of the
              ids (``ids != pad``): where tokens are and what may see what.

To put more in front of a sequence (a prompt, a prefix, a cache) means: places are
computed as if the sequence were longer, and the stream stays as long as the caller's
tokens, or grows with them. The two are told apart in the graph alone: the stream
starts where the token ids are looked up in a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from .cache_inputs import POSITIONS
from .cost import operator_name
from .errors import PreconditionError
from .program import Program
from .provenance import describe
from .rewriter import Rewriter
from .shapes import VAL
from .signature import InputSpec
from .structure.weights import through
from .symbols import expression

LOOKUPS = {"aten.embedding": 1, "ftc.quantized_embedding": 3}
"""Operators that look rows of a table up, and where among their arguments the indices are."""

_SIZE_ONLY = frozenset(
    {"aten.sym_size", "aten.new_ones", "aten.new_zeros", "aten.new_full", "aten.new_empty"}
)


@dataclass(frozen=True, slots=True)
class Sequence:
    """The sequence dimension of a program.

    Attributes:
        dim: its name in the signature.
        length: its size, a symbol.
        tokens: the input that holds token ids, ``[batch, dim]``.
        lookups: where the ids are looked up in their table.
        stream: nodes that depend on the tokens' embeddings.
        places: inputs and nodes whose value or shape depends on the sequence, and
            which are not of the stream.
    """

    dim: str
    length: sympy.Expr
    tokens: fx.Node
    lookups: tuple[fx.Node, ...]
    stream: frozenset[fx.Node]
    places: frozenset[fx.Node]

    def axes(self, node: fx.Node) -> frozenset[int]:
        """The axes of a tensor whose size depends on the sequence."""
        fake = node.meta.get(VAL)
        if not isinstance(fake, Tensor):
            return frozenset()
        return frozenset(i for i, size in enumerate(fake.shape) if self.depends(size))

    def neutral_id(self) -> int:
        """A token id that the program does not test ids for: not that of padding, say."""
        tested = {
            argument
            for node in self.places
            if any(through(used) is self.tokens for used in node.all_input_nodes)
            for argument in node.args
            if isinstance(argument, int)
        }
        return next(n for n in range(len(tested) + 1) if n not in tested)

    def depends(self, size: Any) -> bool:
        """Whether a size depends on the sequence."""
        form = expression(size)
        return not isinstance(form, int) and not self.length.free_symbols.isdisjoint(
            form.free_symbols
        )

    def is_length(self, size: Any) -> bool:
        """Whether a size is the sequence's, and not a multiple of it or the like."""
        return bool(expression(size) == self.length)


def find_sequence(rw: Rewriter) -> Sequence | None:
    """The sequence of the program that ``rw`` rewrites; None where no table is read by an input.

    Fake values are computed again where the inputs' dimensions are different symbols.

    Raises:
        PreconditionError: for a sequence of fixed length.
    """
    found = _token_input(rw.program)
    if found is None:
        return None
    tokens, spec = found
    dim = spec.shape[-1]
    if not isinstance(dim, str):
        raise PreconditionError(
            f"{rw.made_by}: the sequence has the fixed length {dim}",
            where=describe(tokens),
            fix="capture the model with a dynamic sequence",
        )
    if len(_lengths(rw.program, dim)) > 1:
        rw.refresh()
    (length,) = _lengths(rw.program, dim)
    lookups = tuple(n for n in rw.graph.nodes if _looks_up(n, tokens))
    values = (n for n, i in inputs(rw.program) if i.dtype.is_floating_point and i.role == "value")
    stream = _closure(rw.graph, {*lookups, *values})
    partial = Sequence(dim, length, tokens, lookups, stream, frozenset())
    places = _places(rw.program, partial)
    return Sequence(dim, length, tokens, lookups, stream, places)


def inputs(program: Program) -> Iterable[tuple[fx.Node, InputSpec]]:
    """The placeholders with their specifications."""
    nodes = (n for n in program.graph.nodes if n.op == "placeholder")
    return zip(nodes, program.signature.inputs, strict=True)


def lookup_index(node: fx.Node) -> Any:
    """The indices that a lookup in a table reads at; None where ``node`` is no lookup."""
    place = LOOKUPS.get(operator_name(node)) if node.op == "call_function" else None
    return None if place is None else node.args[place]


def size_only(node: fx.Node) -> bool:
    """Whether a node reads the size of its input, and no number in it."""
    return node.op == "call_function" and operator_name(node) in _SIZE_ONLY


def token_inputs(program: Program, sequence: Sequence, ids: Tensor) -> dict[str, Tensor]:
    """Inputs of a program for one text, all of it seen.

    Args:
        ids: of its tokens, ``[length]``.

    Returns:
        ``[1, length]`` of every input along the sequence; of the others as little as is legal.
    """
    sizes = {sequence.dim: len(ids)}
    made = {}
    for node, spec in inputs(program):
        if node is sequence.tokens:
            made[spec.name] = ids.to(spec.dtype)[None]
        elif spec.name == POSITIONS:
            made[spec.name] = torch.arange(len(ids), dtype=spec.dtype)[None]
        else:
            shape = [d if isinstance(d, int) else sizes.get(d, 1) for d in spec.shape]
            fill = 1 if spec.role == "mask" else spec.low
            made[spec.name] = torch.full(shape, fill, dtype=spec.dtype)
    return made


def _token_input(program: Program) -> tuple[fx.Node, InputSpec] | None:
    """The first input of integers that is looked up in a table."""
    for node, spec in inputs(program):
        integer = not spec.dtype.is_floating_point and spec.role == "value"
        if (
            integer
            and len(spec.shape) == 2
            and any(_looks_up(n, node) for n in program.graph.nodes)
        ):
            return node, spec
    return None


def _looks_up(node: fx.Node, tokens: fx.Node) -> bool:
    return through(lookup_index(node)) is tokens


def _lengths(program: Program, dim: str) -> set[sympy.Expr]:
    return {
        expression(size)
        for node, spec in inputs(program)
        for size, name in zip(node.meta[VAL].shape, spec.shape, strict=True)
        if name == dim
    }


def _closure(graph: fx.Graph, starts: set[fx.Node]) -> frozenset[fx.Node]:
    """``starts`` and what depends on their values, not on their sizes alone."""
    reached = set(starts)
    for node in graph.nodes:
        reads = node.op == "call_function" and not size_only(node)
        if reads and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return frozenset(reached)


def _places(program: Program, sequence: Sequence) -> frozenset[fx.Node]:
    places = {n for n, spec in inputs(program) if sequence.dim in spec.shape} - sequence.stream
    for node in program.graph.nodes:
        if node.op != "call_function" or node in sequence.stream:
            continue
        if operator_name(node) == "aten.sym_size":
            if sequence.depends(node.meta[VAL]):
                places.add(node)
        elif not places.isdisjoint(node.all_input_nodes):
            places.add(node)
    return frozenset(places)
