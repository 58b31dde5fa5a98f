"""How a cut goes through operators that compute: elementwise, norms, products, attention."""

from __future__ import annotations

from typing import Any

from torch import fx

from ftc.graph.cost import argument, operator_name

from .split import Split, Whole
from .spread import Run, rule


@rule("add", "sub", "rsub", "mul", "div", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt",
      "square", "tanh", "sigmoid", "relu", "gelu", "silu", "elu", "leaky_relu", "hardtanh",
      "relu6", "softplus", "mish", "hardswish", "hardsigmoid", "erf", "clamp", "clamp_min",
      "clamp_max", "where", "masked_fill", "maximum", "minimum", "to", "_to_copy", "type_as",
      "contiguous", "clone", "alias", "detach", "dropout", "nan_to_num", "eq", "ne", "lt", "le",
      "gt", "ge", "logical_not", "logical_and", "logical_or", "__and__", "__or__", "cos", "sin",
      "reciprocal", "zeros_like", "ones_like", "full_like", "softsign", "log_sigmoid", "isnan",
      "isinf", "sign", "selu", "celu")  # fmt: skip
def _elementwise(run: Run, node: fx.Node) -> Split:
    out = run.broadcast(node, node.all_input_nodes)
    run.meet(node, node.all_input_nodes, out)
    return out


@rule("mean", "sum", "amax", "amin", "var", "any", "all", "linalg_vector_norm")
def _reduce(run: Run, node: fx.Node) -> Split:
    split, dims = run.one(node.args[0]), argument(node, "dim")
    rank = len(run.on.shape(node.args[0]))
    axes = [d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))]
    if split.axis in axes:
        raise Whole(f"{operator_name(node)} sums over what is cut")
    kept = len(run.on.shape(node)) == rank
    return split if kept else split.at(split.axis - sum(axis < split.axis for axis in axes))


@rule("softmax", "_softmax", "log_softmax", "cumsum")
def _along(run: Run, node: fx.Node) -> Split:
    split = run.one(node.args[0])
    if split.axis == argument(node, "dim") % len(run.on.shape(node)):
        raise Whole(f"{operator_name(node)} runs along what is cut")
    return split


@rule("layer_norm", "rms_norm")
def _norm(run: Run, node: fx.Node) -> Split:
    split, width = run.one(node.args[0]), argument(node, "normalized_shape")
    if split.axis >= len(run.on.shape(node)) - len(width):
        raise Whole(f"{operator_name(node)} takes the norm over what is cut")
    run.meet(node, node.all_input_nodes[1:], split)
    return split


@rule("matmul", "bmm")
def _matmul(run: Run, node: fx.Node) -> Split:
    left, right = node.all_input_nodes[:2]
    rank, wide = len(run.on.shape(node)), len(run.on.shape(left))
    if left in run.cut and run.one(left).axis == wide - 2 and right not in run.cut:
        if len(run.on.shape(right)) != 2:
            raise Whole(f"{operator_name(node)} multiplies rows that are cut by several matrices")
        run.edits.same(node, right)
        return run.one(left).at(rank - 2)
    return _batched(run, node, [left, right], [left, right])


@rule("baddbmm")
def _add_matmul(run: Run, node: fx.Node) -> Split:
    added, left, right = node.all_input_nodes
    return _batched(run, node, [left, right], [added, left, right])


def _batched(
    run: Run, node: fx.Node, factors: list[fx.Node], operands: list[fx.Node]
) -> Split:  # fmt: skip
    """Products of matrices, some of which each rank has."""
    out = run.broadcast(node, factors)
    if out.axis >= len(run.on.shape(node)) - 2:
        raise Whole(f"{operator_name(node)} sums over what is cut")
    run.meet(node, operands, out)
    return out


@rule("scaled_dot_product_attention")
def _attend(run: Run, node: fx.Node) -> Split:
    sides: Any = node.args[:3]
    cuts = [run.one(side) for side in sides]
    first, axis = cuts[0], len(run.on.shape(node)) - 3
    between = all(c.axis == axis and c.outer == 1 and not c.repeated for c in cuts)
    grouped = bool(argument(node, "enable_gqa"))
    alike = grouped or all(c.like(first, run.on.size) for c in cuts)
    if not between or not alike or not run.even(first):
        raise Whole(f"{operator_name(node)} is not cut between heads")
    if isinstance(mask := argument(node, "attn_mask"), fx.Node):
        run.meet(node, [mask], first)
    return first


@rule("linear", "ftc.quantized_linear")
def _linear(run: Run, node: fx.Node) -> Split | None:
    split = run.one(node.args[0])
    if split.axis < len(run.on.shape(node.args[0])) - 1:
        if operator_name(node) == "aten.linear":
            for used in node.all_input_nodes[1:]:
                run.edits.same(node, used)
        return split
    if not run.even(split) or split.outer != 1:
        raise Whole(f"{operator_name(node)} takes features that several ranks have")
    run.edits.columns(node, split)
    run.ends.append(node)
    return None
