"""Which kernel each product of a program has: read off the graph, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.program import Program
from ftc.graph.symbols import SizesAt
from ftc.graph.target import Kernel, Target

_SUFFIX = ".quantized"


@dataclass(frozen=True, slots=True)
class Assigned:
    """One product with a weight.

    Attributes:
        weight: its name.
        kernel: what multiplies; None for a form that no kernel of the target has.
        bits: of the weight.
        activation: how its input is quantized; ``none`` for not at all.
        speed: times as fast as float on the target, for each of the shapes; empty
            without costs.
    """

    weight: str
    kernel: Kernel | None
    bits: int
    activation: str
    speed: tuple[float, ...]


def assigned(
    program: Program, target: Target, shapes: Sequence[Mapping[str, int]]
) -> tuple[Assigned, ...]:
    """Every product of a program with fake values, in graph order."""
    sizes = [SizesAt(program, shape) for shape in shapes]
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or operator_name(node) not in _FORMS:
            continue
        weight = argument(node, _FORMS[operator_name(node)])
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            kernel, bits, activation = _form(node)
            speed = tuple(_speed(node, kernel, at, target) for at in sizes)
            known = tuple(each for each in speed if each is not None)
            name = str(weight.target).removesuffix(_SUFFIX)
            found.append(Assigned(name, kernel, bits, activation, known))
    return tuple(found)


_FORMS = {"aten.linear": "weight", "ftc.quantized_linear": "data"}


def _form(node: fx.Node) -> tuple[Kernel | None, int, str]:
    if operator_name(node) == "aten.linear":
        return "float", 32, "none"
    bits, group, activation = (argument(node, a) for a in ("bits", "group_size", "activation"))
    if activation == "none":
        return "float", bits, activation
    if activation == "block":
        return ("blocked4" if bits == 4 else "blocked"), bits, activation
    return ("integer" if bits == 8 and group == 0 else None), bits, activation


def _speed(node: fx.Node, kernel: Kernel | None, at: SizesAt, target: Target) -> float | None:
    table = target.table
    if table is None or kernel is None or not {kernel, "float"} <= table.points.keys():
        return None
    inputs, outputs = at.shape(node.args[0])[-1], at.shape(node)[-1]
    work = (max(at.numel(node) // outputs, 1), inputs, outputs)
    return round(table.seconds("float", *work) / table.seconds(kernel, *work), 3)
