"""The invariants of a program, one function a rule: its docstring is the sentence of the rule.

A rule yields the violations it finds. Rules about fake values (shapes) hold
vacuously for a program just read from disk, which has none. Each looks at each
node once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .cost import argument
from .errors import nearest
from .program import Program
from .provenance import KEY
from .quantized_ops import ACTIVATIONS
from .shapes import VAL
from .signature import Dim, format_shape

_KINDS = ("placeholder", "get_attr", "call_function", "output")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
          torch.memory_format)  # fmt: skip
_FUNCTIONS = ("_operator", "operator", "math", "torch")


@dataclass(frozen=True, slots=True)
class Breach:
    """One violation: what is the case instead, at which node, and what to do."""

    detail: str
    fix: str
    node: fx.Node | None = None


class View:
    """A program's nodes and tensors, collected once for all rules."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.signature = program.signature
        self.nodes = list(program.graph.nodes)
        self.tensors = dict(program.tensors())
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.readers = [n for n in self.nodes if n.op == "get_attr"]
        self.calls = [n for n in self.nodes if n.op == "call_function"]
        self.has_fakes = any(VAL in n.meta for n in self.nodes)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What the output node returns, one entry an output."""
        leaves = self.nodes[-1].args[0] if self.nodes and self.nodes[-1].args else ()
        return tuple(leaves) if isinstance(leaves, (tuple, list)) else (leaves,)


def kinds(view: View) -> Iterator[Breach]:
    """A node reads an input or a tensor, calls a function, or returns."""
    for node in view.nodes:
        if node.op not in _KINDS:
            yield Breach(f"{node.name} is a {node.op}", "express it with an operator", node)


def order(view: View) -> Iterator[Breach]:
    """Every value is defined before it is used."""
    seen: set[fx.Node] = set()
    for node in view.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                yield Breach(
                    f"{node.name} uses {used.name}, which comes later or was erased",
                    "insert the user after what it uses: rw.at(user)", node,
                )  # fmt: skip
        seen.add(node)


def single_output(view: View) -> Iterator[Breach]:
    """The graph ends with its one output node."""
    count = sum(n.op == "output" for n in view.nodes)
    if count != 1 or view.nodes[-1].op != "output":
        yield Breach(f"there are {count} output nodes", "end the graph with one tuple of outputs")


def inputs(view: View) -> Iterator[Breach]:
    """The graph takes what the signature says."""
    specs = view.signature.inputs
    names = [(str(n.target), n.name) for n in view.inputs]
    if len(names) != len(specs) or any(s.name not in n for n, s in zip(names, specs, strict=True)):
        yield Breach(
            f"the graph takes {[n for n, _ in names]} and the signature {[s.name for s in specs]}",
            "change the signature together with the placeholders",
        )
        return
    for node, spec in zip(view.inputs, specs, strict=True):
        if VAL in node.meta:
            yield from _fits(node, node.meta[VAL], spec.dtype, spec.shape)


def outputs(view: View) -> Iterator[Breach]:
    """The graph returns what the signature says."""
    specs = view.signature.outputs
    if len(view.outputs) != len(specs):
        yield Breach(
            f"the graph returns {len(view.outputs)} values and the signature {len(specs)}",
            "change the signature together with the output node", view.nodes[-1],
        )  # fmt: skip
        return
    for node, spec in zip(view.outputs, specs, strict=True):
        if not isinstance(node, fx.Node):
            yield Breach(f"output {spec.name} is the constant {node!r}", "return a tensor")
        elif VAL in node.meta:
            yield from _fits(node, node.meta[VAL], spec.dtype, spec.shape)


def _fits(node: fx.Node, fake: Any, dtype: torch.dtype, dims: tuple[Dim, ...]) -> Iterator[Breach]:
    """A fixed dimension must be that number; a named one may be any size."""
    if not isinstance(fake, Tensor) or fake.dtype != dtype or not _same_dims(fake, dims):
        detail = f"{node.name} is {_type(fake)}, not {dtype} {format_shape(dims)}"
        yield Breach(detail, "change the signature together with the graph", node)


def _same_dims(fake: Tensor, dims: tuple[Dim, ...]) -> bool:
    return len(fake.shape) == len(dims) and all(
        d == s or isinstance(d, str) or not isinstance(s, int)
        for d, s in zip(dims, fake.shape, strict=True)
    )


def tensors_exist(view: View) -> Iterator[Breach]:
    """Every tensor that is read exists."""
    for node in view.readers:
        if (name := str(node.target)) not in view.tensors and not _aliased(view, name):
            yield Breach(f"{node.name} reads {name}", nearest(name, view.tensors), node)


def _aliased(view: View, name: str) -> bool:
    """Whether ``name`` is a second name of a tensor that is listed under its first."""
    try:
        return isinstance(view.program.tensor(name), Tensor)
    except AttributeError:
        return False


def tensors_read(view: View) -> Iterator[Breach]:
    """Every tensor that exists is read, or is what a run begins behind."""
    read = {str(n.target) for n in view.readers} | set(view.program.signature.start.values())
    for name in view.tensors:
        if name not in read:
            yield Breach(f"nothing reads {name}", "remove it: rw.finish() drops what is not read")


def operators(view: View) -> Iterator[Breach]:
    """A call is to an operator overload or to arithmetic on sizes."""
    for node in view.calls:
        target: Any = node.target
        if isinstance(target, OpOverload):
            continue
        if str(getattr(target, "__module__", "")).split(".")[0] not in _FUNCTIONS:
            yield Breach(f"{node.name} calls {target}", "call an operator overload", node)


def functional(view: View) -> Iterator[Breach]:
    """No operator writes to its arguments."""
    for node in view.calls:
        # Batch norm updates its running statistics when training; nothing reads those before.
        target = node.target
        writes = isinstance(target, OpOverload) and target._schema.is_mutable
        if writes and "batch_norm" not in str(target):
            yield Breach(f"{target} writes to its input", "use its functional form", node)


def literals(view: View) -> Iterator[Breach]:
    """An argument is a node or a plain constant."""
    for node in view.calls:
        for value in _leaves((node.args, node.kwargs)):
            if not isinstance(value, (fx.Node, *_PLAIN)):
                yield Breach(f"{node.name} takes a {type(value).__name__} as a constant",
                             "pass a number, or a tensor through rw.add_buffer", node)  # fmt: skip


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step))
    else:
        yield value


def provenance(view: View) -> Iterator[Breach]:
    """Every call says where it came from."""
    for node in view.calls:
        if KEY not in node.meta:
            yield Breach(f"{node.name} has none", "make nodes through rw.call", node)


def fakes(view: View) -> Iterator[Breach]:
    """Every value has a fake value, or none has."""
    for node in view.nodes:
        if view.has_fakes and VAL not in node.meta and node.op != "output":
            yield Breach(f"{node.name} has none", "make nodes through rw.call", node)


def fakes_of_tensors(view: View) -> Iterator[Breach]:
    """A tensor has the type its node says."""
    for node in view.readers:
        if (fake := node.meta.get(VAL)) is None:
            continue
        tensor = view.program.tensor(str(node.target))
        if fake.dtype != tensor.dtype or tuple(fake.shape) != tuple(tensor.shape):
            yield Breach(f"{node.target} is {_type(tensor)} and its node says {_type(fake)}",
                         "change tensors through rw.set_tensor", node)  # fmt: skip


def dtypes(view: View) -> Iterator[Breach]:
    """A parameter holds floats."""
    for name, parameter in view.program.module.named_parameters():
        if parameter.dtype not in _FLOATS:
            yield Breach(f"{name} is {parameter.dtype}", "hold integers and codes in buffers")


def ties(view: View) -> Iterator[Breach]:
    """Of tied names at least one exists."""
    for names in view.program.lost_ties():
        yield Breach(f"none of {sorted(names)} exists", "drop the tie together with its tensor")


def quantized(view: View) -> Iterator[Breach]:
    """Codes, scales and zero points of quantized weights fit."""
    for node in view.calls:
        if not isinstance(node.target, OpOverload) or node.target.namespace != "ftc":
            continue
        declared = {a.name for a in node.target._schema.arguments}
        if {"data", "scale", "bits", "group_size"} <= declared:
            problem = _quantized_problem(view, node, "activation" in declared)
            if problem:
                yield Breach(f"{node.name} has {problem}", "use ftc.graph.quantize", node)


def _quantized_problem(view: View, node: fx.Node, has_activation: bool) -> str | None:
    """What is wrong with the codes of a quantized operator; shapes as in ``quantize``."""
    bits, group_size = argument(node, "bits"), argument(node, "group_size")
    if bits not in (4, 8):
        return f"bits={bits}, not 4 or 8"
    if has_activation and (activation := argument(node, "activation")) not in ACTIVATIONS:
        return f"activation={activation!r}, not one of {', '.join(ACTIVATIONS)}"
    sources = [argument(node, name) for name in ("data", "scale", "zero_point")]
    if any(s is not None and (not isinstance(s, fx.Node) or s.op != "get_attr") for s in sources):
        return None  # computed codes: their shapes are the fake kernel's to check
    data, scale, zero = (None if s is None else view.program.tensor(str(s.target)) for s in sources)
    wanted = torch.uint8 if bits == 4 else torch.int8
    if data is None or scale is None or data.dtype != wanted:
        return f"codes that are not 8-bit integers, {wanted} at bits={bits}"
    width = data[0].numel() * (8 // bits)
    if group_size < 0 or (group_size and width % group_size):
        return f"group_size={group_size}, which does not divide {width}"
    expected = (data.shape[0], width // group_size if group_size else 1)
    if tuple(scale.shape) != expected or not scale.is_floating_point():
        return f"a scale that is {_type(scale)}, not floats of {list(expected)}"
    if zero is not None and tuple(zero.shape) != expected:
        return f"a zero point of shape {list(zero.shape)}, not {list(expected)}"
    return None


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} [{', '.join(map(str, value.shape))}]"
    return type(value).__name__


RULES = (
    kinds,
    order,
    single_output,
    inputs,
    outputs,
    tensors_exist,
    tensors_read,
    operators,
    functional,
    literals,
    provenance,
    fakes,
    fakes_of_tensors,
    dtypes,
    ties,
    quantized,
)
"""Every rule, in the order they are checked."""
