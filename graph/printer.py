"""A program as text that is the same for the same program, on every machine and run.

One line a node, tensors by their names, sizes by the signature's dimensions::

    program feature-extraction
    @encoder.layer.0.fc.weight: f32[1536, 384] parameter
    %input_ids: i64[batch, sequence] input
    %linear_3: f32[batch, sequence, 1536] = aten.linear(%x, @encoder.layer.0.fc.weight)  # fc
    return last_hidden_state=%layer_norm_12

An operator's ``.default`` overload is left out, long literals are shortened, and
a node that a pass made says so. :func:`fingerprint` hashes a form of that text
in which nodes are numbered and neither sources nor inferred shapes occur, so a
program read back from disk has the fingerprint it was saved with.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from .program import Program
from .provenance import provenance
from .shapes import VAL
from .signature import Dim, format_shape
from .symbols import DimensionNames

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_LONGEST_LIST = 8
Names = Callable[[fx.Node], str]


def print_graph(program: Program, *, weights: bool = False) -> str:
    """The program as text, one line a node.

    Args:
        weights: add to each tensor its mean, standard deviation and range.
    """
    return "\n".join(_lines(program, weights=weights)) + "\n"


def diff(before: Program, after: Program) -> str:
    """What changed, as a unified diff of the printed graphs; ``""`` when nothing did.

    Lines are aligned by what is kept of each node: a line that differs only in
    where it came from counts as unchanged.
    """
    old, new = map(_bare, _lines(before)), list(_lines(after))
    full = {_bare(line): line for line in new}
    lines = difflib.unified_diff(list(old), list(full), "before", "after", n=2, lineterm="")
    return "\n".join(
        line[0] + full.get(line[1:], line[1:]) if line[:1] == "+" else line for line in lines
    )


def fingerprint(program: Program) -> str:
    """16 hex digits that change with the graph, its tensors' types or its signature.

    Values of weights, node names, sources and inferred shapes do not enter.
    """
    numbers = {node: str(i) for i, node in enumerate(program.graph.nodes)}
    text = [repr(program.signature.task), repr(dict(program.signature.limits))]
    for spec in program.signature.inputs:
        bounds = "" if spec.dtype.is_floating_point else f" {spec.low}..{spec.high}"
        text.append(f"{spec.name}: {_type(spec.dtype, spec.shape)}{bounds} {spec.role}")
    text += [f"{s.name}: {_type(s.dtype, s.shape)}" for s in program.signature.outputs]
    text += sorted(" = ".join(sorted(names)) for names in program.ties)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            text.append(_declare(program, node))
        elif node.op == "call_function":
            text.append(f"{numbers[node]} = {_call(node, numbers.__getitem__)}")
        elif node.op == "output":
            text.append(_literal(node.args[0], numbers.__getitem__))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def operator_text(target: Any) -> str:
    """``aten.linear`` for a default overload, ``aten.add.Tensor`` for another, ``operator.mul``."""
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    module = str(getattr(target, "__module__", "")).lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _lines(program: Program, *, weights: bool = False) -> Iterator[str]:
    """The header, every node, and the ties."""
    yield f"program {program.signature.task}"
    dims = DimensionNames(program)
    inputs = iter(program.signature.inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = next(inputs)
            role = " mask" if spec.role == "mask" else ""
            yield f"%{node.name}: {_type(spec.dtype, spec.shape)} input{role}"
        elif node.op == "get_attr":
            line = f"{_declare(program, node)}{_comment(node)}"
            summary = f"  {_summary(program.tensor(str(node.target)))}" if weights else ""
            yield line + summary
        elif node.op == "output":
            leaves: Any = node.args[0]
            pairs = zip(program.signature.output_names, leaves, strict=False)
            yield "return " + ", ".join(f"{n}={_literal(v, _name)}" for n, v in pairs)
        else:
            value = _value(node.meta.get(VAL), dims)
            yield f"%{node.name}{value} = {_call(node, _name)}{_comment(node)}"
    for names in sorted(map(sorted, program.ties)):
        yield f"tied {' = '.join('@' + name for name in names)}"


def _declare(program: Program, node: fx.Node) -> str:
    tensor = program.tensor(str(node.target))
    kind = "buffer"
    if isinstance(tensor, nn.Parameter):
        kind = "parameter" if tensor.requires_grad else "frozen parameter"
    return f"@{node.target}: {_type(tensor.dtype, tuple(tensor.shape))} {kind}"


def _call(node: fx.Node, name: Names) -> str:
    arguments = [_literal(a, name) for a in node.args]
    arguments += [f"{key}={_literal(a, name)}" for key, a in sorted(node.kwargs.items())]
    return f"{operator_text(node.target)}({', '.join(arguments)})"


def _name(node: fx.Node) -> str:
    return node.name


def _literal(value: Any, name: Names) -> str:
    """The text of an argument; a list of numbers longer than eight is shortened."""
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{name(value)}"
    if isinstance(value, (list, tuple)):
        items = [_literal(v, name) for v in value]
        if len(items) > _LONGEST_LIST and not any(isinstance(v, fx.Node) for v in value):
            digest = hashlib.sha256(",".join(items).encode()).hexdigest()[:8]
            items = [*items[:3], f"… {len(items)} items {digest}"]
        return f"[{', '.join(items)}]"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, (torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    return repr(value)


def _value(value: Any, dims: DimensionNames) -> str:
    """``: f32[batch, 384]`` of a fake value; nothing before propagation."""
    if isinstance(value, Tensor):
        return f": {_dtype(value.dtype)}{dims.shape(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f": ({', '.join(_value(v, dims).removeprefix(': ') for v in value)})"
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return f": size {dims.size(value)}"
    return ""


def _comment(node: fx.Node) -> str:
    origin = provenance(node)
    parts = [" ".join(p for p in (origin.module, origin.source) if p)]
    if origin.made_by != "capture":
        parts.append(f"by {origin.made_by}")
    if custom := node.meta.get("custom"):
        parts.append(" ".join(f"{k}={v!r}" for k, v in sorted(custom.items())))
    text = ", ".join(p for p in parts if p)
    return f"  # {text}" if text else ""


def _bare(line: str) -> str:
    return line.split("  # ")[0]


def _type(dtype: torch.dtype, shape: tuple[Dim, ...]) -> str:
    return _dtype(dtype) + format_shape(shape)


def _dtype(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _summary(tensor: Tensor) -> str:
    if not tensor.numel():
        return "empty"
    values = tensor.detach().double()
    deviation = float(values.std(unbiased=False))
    low, high = float(values.min()), float(values.max())
    return f"mean {float(values.mean()):.3g} std {deviation:.3g} in [{low:.3g}, {high:.3g}]"
