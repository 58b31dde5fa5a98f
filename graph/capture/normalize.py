"""From torch.export's unlifted module to a program's graph, once, at capture.

What goes: guards and metadata asserts (they bake the traced dtype in), wrappers
that switch gradients or autocast off (inlined), lifts of constants, in-place
operators (made functional), the pytree calling convention. What comes:
provenance instead of kilobytes of traceback, and eval mode as the default.
Each step is exact.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from ftc.graph.errors import CaptureError
from ftc.graph.mode import set_mode
from ftc.graph.program import build_module
from ftc.graph.provenance import describe, stamp_captured
from ftc.graph.shapes import VAL

aten = torch.ops.aten

_ASSERTS = {
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten._assert_async",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_LIFTS = {"aten.lift_fresh", "aten.lift_fresh_copy", "aten.alias"}
_KEPT_META = (VAL, "custom", "provenance")


def normalize(module: fx.GraphModule) -> fx.GraphModule:
    """A flat, functional graph module with the same tensors, in eval mode.

    Args:
        module: ``ep.module(check_guards=False)``.

    Raises:
        CaptureError: for an in-place write that has no functional form here.
    """
    graph = fx.Graph()
    inliner = _Inliner(module, graph)
    output = graph.output(inliner.copy(module, "", {}))
    output.meta = dict(module.graph.output_node().meta)
    for node in [*inliner.copies, output]:
        stamp_captured(node)
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    for node in reversed(inliner.copies):
        if node.op == "placeholder":
            graph._root.append(node)
    _drop_asserts(graph)
    _functionalize(graph)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    tensors = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            tensors[str(node.target)] = _own(_lookup(module, str(node.target)))
    result = build_module(tensors, graph)
    set_mode(result, training=False)
    return result


class _Inliner:
    """Copies a module's nodes into ``graph``, entering the bodies of wrappers.

    Attributes:
        copies: the nodes made, in order.
    """

    def __init__(self, root: fx.GraphModule, graph: fx.Graph) -> None:
        self._root, self._graph = root, graph
        self._readers: dict[str, fx.Node] = {}
        self._trainable: set[fx.Node] = set()  # values that a parameter goes into
        self.copies: list[fx.Node] = []

    def copy(self, module: fx.GraphModule, path: str, env: dict[fx.Node, Any]) -> tuple[Any, ...]:
        """Copies one graph; returns the copies of its outputs.

        Args:
            module: the root, or the body of a wrapper.
            path: its qualified name with a final dot, ``""`` for the root.
            env: copies of the placeholders, for a body.
        """
        entered: dict[fx.Node, tuple[Any, ...]] = {}
        for node in module.graph.nodes:
            target = str(node.target)
            if node in env or (
                node.op == "get_attr" and isinstance(_lookup(module, target), nn.Module)
            ):
                continue
            if node.op == "output":
                leaves = torch.utils._pytree.tree_leaves(node.args[0])
                return tuple(env[n] if isinstance(n, fx.Node) else n for n in leaves)
            if node.op == "call_function" and any(name in target for name in _WRAPPERS):
                entered[node] = self._enter(module, path, node, env)
            elif node.target is operator.getitem and node.args[0] in entered:
                env[node] = entered[node.args[0]][node.args[1]]
            elif node.op == "get_attr":
                env[node] = self._reader(path + target, node)
            else:
                env[node] = self._keep(self._graph.node_copy(node, env.__getitem__))
        raise AssertionError("a graph without an output")

    def _enter(
        self, module: fx.GraphModule, path: str, call: fx.Node, env: dict[fx.Node, Any]
    ) -> tuple[Any, ...]:
        """Inlines the body of a wrapper; what ran without gradients stays without them."""
        place = next(
            i for i, a in enumerate(call.args)
            if isinstance(a, fx.Node) and a.op == "get_attr"
            and isinstance(_lookup(module, str(a.target)), fx.GraphModule)
        )  # fmt: skip
        name = str(call.args[place].target)  # type: ignore[union-attr]
        body = _lookup(module, name)
        autocast = "autocast" in str(call.target)
        if autocast and True in call.args[:place]:
            inside = next(n for n in body.graph.nodes if n.op == "call_function")
            stamp_captured(inside)
            raise CaptureError(
                "the model switches autocast on inside itself",
                where=describe(inside),
                fix="capture it in the dtype that computes, without the `with torch.autocast`",
            )
        holders = [n for n in body.graph.nodes if n.op == "placeholder"]
        operands = [env[a] if isinstance(a, fx.Node) else a for a in call.args[place + 1 :]]
        outputs = self.copy(body, f"{path}{name}.", dict(zip(holders, operands, strict=True)))
        if autocast or call.args[0] is True:
            return outputs
        return tuple(self._detached(node) for node in outputs)

    def _detached(self, node: Any) -> Any:
        if node not in self._trainable:
            return node
        copy = self._graph.call_function(aten.detach.default, (node,))
        copy.meta = dict(node.meta)
        self.copies.append(copy)
        return copy

    def _reader(self, target: str, node: fx.Node) -> fx.Node:
        """The one node that reads the tensor ``target``."""
        if target not in self._readers:
            copy = self._keep(self._graph.node_copy(node))
            copy.target = target
            self._readers[target] = copy
            if isinstance(_lookup(self._root, target), nn.Parameter):
                self._trainable.add(copy)
        return self._readers[target]

    def _keep(self, copy: fx.Node) -> fx.Node:
        self.copies.append(copy)
        if not self._trainable.isdisjoint(copy.all_input_nodes):
            self._trainable.add(copy)
        return copy


def _drop_asserts(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        name = str(node.target).rsplit(".", 1)[0]
        if name in _ASSERTS:
            graph.erase_node(node)
        elif name in _LIFTS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _functionalize(graph: fx.Graph) -> None:
    """Replaces in-place operators by their functional forms.

    ``y = relu_(x)`` becomes ``y = relu(x)`` and every later reader of ``x``
    reads ``y``. Sound while no view of ``x`` is alive across the write, which is
    checked. Counters of batch norm are dropped: nothing reads them.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target is aten.detach_.default:
            node.target = aten.detach.default
        if not node.target._schema.is_mutable or not node.args:
            continue
        written = node.args[0]
        assert isinstance(written, fx.Node)
        if written.op == "get_attr" and set(written.users) == {node} and not node.users:
            graph.erase_node(node)
            continue
        functional = _functional_form(node.target)
        if functional is None:
            if "batch_norm" in str(node.target):
                continue
            raise CaptureError(
                f"in-place operator {node.target}",
                where=describe(node),
                fix="use its functional form in the model",
            )
        late = [u for u in written.users if order.get(u, 0) > order[node]]
        if written.op in ("get_attr", "placeholder") or _has_live_view(written, order, order[node]):
            raise CaptureError(
                f"{node.target} writes to a tensor that others share",
                where=describe(node),
                fix="write to a copy: x = x.clone()",
            )
        node.target = functional
        if node.target is aten.copy.default:
            node.target, node.args = aten.expand_as.default, (node.args[1], written)
        for user in late:
            user.replace_input_with(written, node)


def _functional_form(op: OpOverload) -> OpOverload | None:
    """``aten.relu_.default`` -> ``aten.relu.default``; None where there is none."""
    name = op._schema.name.split("::")[1]
    packet = getattr(getattr(torch.ops, op.namespace), name.removesuffix("_"), None)
    return getattr(packet, op._overloadname, None) if name.endswith("_") and packet else None


def _has_live_view(node: fx.Node, order: dict[fx.Node, int], write: int) -> bool:
    """Whether a view of ``node``, or what it is a view of, is read after ``write``."""
    views = [u for u in node.users if order[u] < write and _is_view(u)]
    if any(order.get(reader, 0) > write for view in views for reader in view.users):
        return True
    base = node.args[0] if _is_view(node) else None
    return isinstance(base, fx.Node) and any(order.get(r, 0) > write for r in base.users)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, OpOverload)
        and any(r.alias_info is not None for r in target._schema.returns)
    )


def _lookup(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _own(tensor: Tensor) -> Tensor:
    """A parameter of our own on the same storage; buffers are shared as they are."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
    return tensor.detach()
