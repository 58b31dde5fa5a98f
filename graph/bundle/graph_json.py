"""A graph as JSON and back: allow-listed operators, typed literals, nothing evaluated.

A node is ``{"op", "name", "target", "args", "kwargs"}`` in graph order, with its
provenance and its annotations where it has any. Strings, integers, booleans,
None and finite floats are JSON's own; everything else says its type::

    {"node": "linear_3"}   {"dtype": "float32"}   {"float": "-inf"}   {"tuple": [...]}

The file may come from anyone. Names go into the Python that fx generates, so
they are identifiers or are refused; operators are looked up in
:mod:`ftc.graph.bundle.allowed`; the sizes they are asked for are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ftc.graph.errors import BundleError
from ftc.graph.provenance import KEY, Provenance, describe, provenance

from .allowed import check_call, operator_name, resolve

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TENSOR_NAME = re.compile(r"[\w\- ]+(\.[\w\- ]+)*", re.ASCII)
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "format": torch.memory_format}
_NAMED: dict[str, dict[str, Any]] = {
    kind: {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, type_)}
    for kind, type_ in _KINDS.items()
}


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph as JSON values.

    Raises:
        BundleError: for an operator or a literal that a bundle cannot hold.
    """
    nodes = []
    for node in graph.nodes:
        try:
            entry: dict[str, Any] = {"op": node.op, "name": node.name}
            if node.op == "call_function":
                entry["target"] = operator_name(node.target)
                check_call(node.target, node.args, node.kwargs)
            elif node.op == "get_attr":
                entry["target"] = check_tensor_name(str(node.target))
            entry["args"] = [encode(a) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: encode(v) for k, v in node.kwargs.items()}
            if custom := node.meta.get("custom"):
                entry["custom"] = encode(custom)
        except BundleError as error:
            raise BundleError(error.what, where=describe(node), fix=error.fix) from None
        origin = provenance(node)
        if origin != Provenance():
            entry["from"] = [origin.module, origin.source, origin.made_by]
        nodes.append(entry)
    return nodes


def decode_graph(entries: Sequence[Mapping[str, Any]]) -> fx.Graph:
    """The graph of :func:`encode_graph`'s JSON.

    Raises:
        BundleError: naming the node, for whatever is not allowed.
    """
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            raise BundleError("a node without a name")
        try:
            node = _decode_node(graph, entry, known)
        except BundleError as error:
            raise BundleError(error.what, where=f"node {name[:80]}", fix=error.fix) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"malformed: {type(error).__name__}: {error}", where=f"node {name[:80]}"
            ) from None
        known[name] = node
    if not known or list(graph.nodes)[-1].op != "output":
        raise BundleError("the graph does not end in its output")
    return graph


def _decode_node(graph: fx.Graph, entry: Mapping[str, Any], known: dict[str, fx.Node]) -> fx.Node:
    op, name = entry["op"], entry["name"]
    if not _IDENTIFIER.fullmatch(name) or name in known:
        raise BundleError(f"{name[:80]!r} is no name for a node, or is used twice")
    before = next(reversed(known.values())).op if known else "placeholder"
    if before == "output":
        raise BundleError("a node after the output")
    args = tuple(decode(a, known) for a in entry["args"])
    kwargs = {k: decode(v, known) for k, v in entry.get("kwargs", {}).items()}
    target: Any
    if op == "placeholder":
        if args or kwargs or before != "placeholder":
            raise BundleError("inputs stand first and have no arguments")
        target = name
    elif op == "get_attr":
        target = check_tensor_name(entry["target"])
        if args or kwargs:
            raise BundleError("a tensor's node has no arguments")
    elif op == "output":
        target = "output"
        if (
            kwargs
            or len(args) != 1
            or not isinstance(args[0], tuple)
            or not all(isinstance(leaf, fx.Node) for leaf in args[0])
        ):
            raise BundleError("the output is one tuple of nodes")
    elif op == "call_function":
        target = resolve(entry["target"])
        check_call(target, args, kwargs)
    else:
        raise BundleError(f"unknown kind of node {op!r}")
    node = graph.create_node(op, target, args, kwargs, name)
    if node.name != name:
        raise BundleError(f"{name!r} is no name for a node")
    _decode_meta(node, entry)
    return node


def _decode_meta(node: fx.Node, entry: Mapping[str, Any]) -> None:
    origin = entry.get("from", ["", "", "capture"])
    if len(origin) != 3 or not all(isinstance(part, str) for part in origin):
        raise BundleError("its provenance is malformed")
    node.meta[KEY] = Provenance(*origin)
    if "custom" in entry:
        node.meta["custom"] = decode(entry["custom"], {})


def check_tensor_name(name: str) -> str:
    """``name`` itself, when it can be the name of a parameter.

    Raises:
        BundleError: when it holds anything that could be code.
    """
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise BundleError(
            f"{str(name)[:80]!r} is no name for a tensor",
            fix="use letters, digits, underscores and dots",
        )
    return name


def encode(value: Any) -> Any:
    """A literal, or a structure of literals and nodes, as JSON.

    Raises:
        BundleError: for a type that has no form here.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int) and type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise BundleError("a dictionary whose keys are no strings")
        return {"dict": {k: encode(v) for k, v in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _KINDS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise BundleError(f"a bundle cannot hold an argument of type {type(value).__name__}")


def decode(value: Any, known: Mapping[str, fx.Node]) -> Any:
    """The literal that :func:`encode` wrote; ``known`` are the nodes it may refer to.

    Raises:
        BundleError: for anything that :func:`encode` does not write.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise BundleError(f"an integer of {value.bit_length()} bits")
        return value
    if isinstance(value, list):
        return [decode(v, known) for v in value]
    if not isinstance(value, Mapping) or len(value) != 1:
        raise BundleError("a literal without a type")
    ((kind, content),) = value.items()
    if kind == "node":
        if content not in known:
            raise BundleError(f"it reads {content!r}, which does not come before it")
        return known[content]
    if kind in ("tuple", "slice", "complex"):
        parts = [decode(v, known) for v in content]
        return (
            tuple(parts) if kind == "tuple" else {"slice": slice, "complex": complex}[kind](*parts)
        )
    if kind == "dict":
        return {str(k): decode(v, known) for k, v in content.items()}
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device" and re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", str(content)):
        return torch.device(content)
    table = _NAMED.get(kind, {})
    if content in table:
        return table[content]
    raise BundleError(f"unknown literal {kind[:40]!r}: {str(content)[:40]!r}")
