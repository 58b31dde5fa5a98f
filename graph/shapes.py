"""Shapes and dtypes of every value, without computing any: fake tensors on ``node.meta["val"]``.

A program fresh from capture carries the exporter's fake values. One read from
disk carries none; :func:`propagate` gives it some by running the graph under a
``FakeTensorMode`` whose input dimensions are symbols. A pass needs no further
propagation: the :class:`~ftc.graph.rewriter.Rewriter` computes the fake value of
each node as it inserts it, so a wrong shape is found at the rewrite that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from .errors import BundleError
from .provenance import describe
from .signature import InputSpec, Signature

VAL = "val"
_UNLIKE = 3  # the hint of a size that is added later: small, so that sums with it pass no limit


def value(node: fx.Node) -> Any:
    """The fake value of ``node`` (a FakeTensor, SymInt, number, or a tuple of those)."""
    return node.meta[VAL]


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a tensor-valued node, symbols included."""
    return tuple(value(node).shape)


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the graph's fake values belong to; None before propagation."""
    for node in graph.nodes:
        if isinstance(val := node.meta.get(VAL), FakeTensor):
            return val.fake_mode
    return None


def propagate(module: fx.GraphModule, signature: Signature) -> None:
    """Computes ``meta["val"]`` of every node, with a fresh symbol for each dynamic dimension.

    Raises:
        BundleError: at the node where the shapes of a program from disk do not fit together.
    """
    env = ShapeEnv(duck_shape=True)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    sizes = _distinct_sizes(signature)
    inputs = iter(signature.inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            spec = next(inputs)
            concrete = torch.empty(
                [d if isinstance(d, int) else sizes[d] for d in spec.shape],
                dtype=spec.dtype,
                device="meta",
            )
            kinds = [
                DimDynamic.STATIC if isinstance(d, int) else DimDynamic.DUCK for d in spec.shape
            ]
            context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
            with mode:
                fake = mode.from_tensor(concrete, symbolic_context=context)
                node.meta[VAL] = fake.to("cpu")
        else:
            try:
                infer(node, module, mode)
            except Exception as error:
                raise BundleError(
                    f"the shapes of this program do not fit together: {str(error).splitlines()[0]}",
                    where=describe(node),
                    fix="make the bundle again",
                ) from error


def placeholder(
    node: fx.Node, spec: InputSpec, known: Mapping[str, Any], mode: FakeTensorMode
) -> None:
    """Sets the fake value of an input that is added: a new symbol for a dimension not in ``known``.

    Args:
        node: the placeholder.
        spec: what it stands for.
        known: sizes of dynamic dimensions by name.
        mode: of the other fake values.
    """
    sizes = {d: known[d] if d in known else _symbol(mode) for d in spec.shape if isinstance(d, str)}
    with mode:
        shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
        node.meta[VAL] = torch.empty(shape, dtype=spec.dtype)


def _symbol(mode: FakeTensorMode) -> Any:
    """A size that is equal to no other."""
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    some = torch.empty(_UNLIKE, device="meta")
    with mode:
        return mode.from_tensor(some, symbolic_context=context).shape[0]


def infer(node: fx.Node, module: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Sets the fake value of one node from those of its arguments.

    Raises:
        Whatever the operator raises for arguments of the wrong shape.
    """
    if node.op == "get_attr":
        tensor: Any = module
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        node.meta[VAL] = mode.from_tensor(tensor, static_shapes=True)
    elif node.op == "call_function":
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        assert callable(node.target)
        with mode, torch.no_grad(), _dispatcher(node):
            node.meta[VAL] = node.target(*args, **kwargs)
    elif node.op == "output":
        node.meta[VAL] = fx.node.map_arg(node.args[0], value)
    else:
        raise AssertionError(f"{node.op} has no place in a program")


def _dispatcher(node: fx.Node) -> AbstractContextManager[Any]:
    """Python's compositions for upsampling, as in capture: C++ fixes the batch at its hint."""
    upsampling = "upsample" in str(node.target)
    return enable_python_dispatcher() if upsampling else nullcontext()


def _distinct_sizes(signature: Signature) -> dict[str, int]:
    """A different size for every dynamic dimension, none 0, 1 or equal to a fixed one."""
    fixed = {d for spec in signature.inputs for d in spec.shape if isinstance(d, int)}
    free = (n for n in range(5, 10_000, 2) if n not in fixed)
    return {name: next(free) for name in signature.dims}


def same_type(a: Any, b: Any) -> bool:
    """Whether two fake values agree in structure, dtype and (symbolic) shape."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and len(a.shape) == len(b.shape)
            and all(same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))
        )
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_type, a, b))
    return type(a) is type(b)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols; never guards."""
    return str(a) == str(b) or bool(
        torch.fx.experimental.symbolic_shapes.statically_known_true(a == b)
    )
