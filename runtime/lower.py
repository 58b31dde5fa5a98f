"""Lowering: a program's graph to an ONNX model, node by node.

Nothing is traced again. Every node of the graph is translated by the function
that :mod:`ftc.runtime.lowering` holds for its operator; an operator without one
is decomposed for this one node (:mod:`ftc.runtime.lowering.decompose`) and its
pieces are translated. Weights become initializers that share the program's
memory, under the program's own names; inputs and outputs keep the signature's
names and its named dynamic dimensions. Time and memory are linear in the graph.

Opset 23 is the first with ``Attention`` and ``RMSNormalization``; every fusion
of onnxruntime that the emitted forms rely on was measured at it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import onnx_ir as ir
import torch
from onnx_ir import Value
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx

from ftc.graph import shapes
from ftc.graph.cache_inputs import IN_PLACE
from ftc.graph.cached import is_cached
from ftc.graph.errors import LoweringError
from ftc.graph.program import Program
from ftc.graph.provenance import describe

from .lowering import Emitter, Unsupported
from .lowering.decompose import decompose
from .lowering.file import save_onnx
from .lowering.finish import alive, fold_views, fuse_skips
from .lowering.grouped import writes_in_place
from .lowering.joined import remember
from .lowering.rotary import find_rotary
from .lowering.steps import join_casts
from .lowering.table import STORAGE_ARGUMENTS, translation

__all__ = ["IR_VERSION", "OPSET", "decomposed", "lower", "save_onnx"]

OPSET = 23
IR_VERSION = 11
Dialect = Literal["onnxruntime", "standard"]

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_log = logging.getLogger("ftc.lower")


def lower(program: Program, dialect: Dialect = "onnxruntime") -> ir.Model:
    """The ONNX model of ``program``.

    Args:
        program: in eval mode; one without fake values (just loaded) gets them on
            a clone. Weights are shared, so it must not change until the model is saved.
        dialect: ``standard`` emits operators of ONNX itself only, for other runtimes;
            ``onnxruntime`` also those of onnxruntime that are faster.

    Returns:
        A model whose inputs and outputs are named and shaped as the signature
        says. :func:`decomposed` says which operators had no translation of their own.

    Raises:
        LoweringError: for an operator that has no form in ONNX, with its node,
            module and source line.
    """
    if shapes.fake_mode(program.graph) is None:
        program = program.clone()
        shapes.propagate(program.module, program.signature)
    return _Lowering(program, dialect == "standard").run()


def decomposed(model: ir.Model) -> tuple[str, ...]:
    """Operators of the program that were lowered through their decomposition."""
    text = model.metadata_props.get("decomposed", "")
    return tuple(text.split(", ")) if text else ()


class _Lowering:
    """The walk over one program."""

    def __init__(self, program: Program, standard: bool) -> None:
        self.program = program
        self.emitter = Emitter(program, standard)
        self.decomposed: dict[str, None] = {}
        self.wholes = find_rotary(program)

    def run(self) -> ir.Model:
        env: dict[fx.Node, Any] = {}
        inputs = self._inputs(env)
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                env[node] = self.emitter.weight(name, self.program.tensor(name))
            elif node.op == "call_function":
                env[node] = self._node(node, env)
        outputs = self._outputs(env)
        return self._model(inputs, outputs)

    def _inputs(self, env: dict[fx.Node, Any]) -> list[Value]:
        e = self.emitter
        inputs = []
        placeholders = (n for n in self.program.graph.nodes if n.op == "placeholder")
        for node, spec in zip(placeholders, self.program.signature.inputs, strict=True):
            dims = e.sizes.dims(shapes.value(node))
            env[node] = e.input(spec.name, spec.dtype, dims, spec.shape)
            inputs.append(env[node])
        return inputs

    def _node(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """What stands for ``node``: a value, a tuple of values, or a symbolic size as it is."""
        e = self.emitter
        out = node.meta[shapes.VAL]
        if isinstance(out, (int, float, bool)):
            return out
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        outer = e.node, e.out
        args, kwargs, e.out = _in_fp32(e, (args, kwargs, out))
        if e.node is None:
            e.node = node
        try:
            if (whole := self.wholes.get(node)) is not None:
                result = whole.lower(e, *(env[part] for part in whole.inputs))
            else:
                result = self._translate(node, args, kwargs)
        finally:
            e.node, e.out = outer
        value = self._conform(node, result, out)
        if (found := translation(node.target)) is not None:
            remember(node, value, found[0], args, kwargs)
        return value

    def _translate(self, node: fx.Node, args: Any, kwargs: Mapping[str, Any]) -> Any:
        found = translation(node.target)
        if found is None and isinstance(self.emitter.out, _SYMBOLIC):
            return self.emitter.out
        reason = "it has no translation"
        if found is not None:
            function, names = found
            kept = {k: v for k, v in kwargs.items() if k not in STORAGE_ARGUMENTS or k in names}
            unknown = [k for k, v in kept.items() if k not in names and v is not None]
            if unknown:
                reason = f"its argument {unknown[0]!r} has no translation"
            else:
                kept = {k: v for k, v in kept.items() if k in names}
                try:
                    return function(self.emitter, *args, **kept)
                except Unsupported as unsupported:
                    reason = str(unsupported)
        return self._decompose(node, args, kwargs, reason)

    def _decompose(self, node: fx.Node, args: Any, kwargs: Mapping[str, Any], reason: str) -> Any:
        """Translates the nodes that ``node`` decomposes into, in its place."""
        here = self.emitter.node
        assert here is not None
        try:
            pieces = decompose(node)
        except Unsupported as unsupported:
            raise LoweringError(
                f"{node.target} cannot be lowered to ONNX: {reason}; {unsupported}",
                where=describe(here),
                fix="rewrite it with other operators in the model, or register a translation "
                "with ftc.runtime.lowering.lowers",
            ) from None
        self.decomposed[str(node.target)] = None
        env: dict[fx.Node, Any] = {}
        operands = iter(pieces.operands(args, kwargs))
        for piece in pieces.module.graph.nodes:
            if piece.op == "placeholder":
                env[piece] = next(operands)
            elif piece.op == "get_attr":
                env[piece] = self.emitter.const(
                    tensor := getattr(pieces.module, str(piece.target)), tensor.dtype
                )
            elif piece.op == "call_function":
                env[piece] = self._node(piece, env)
            else:
                return fx.node.map_arg(piece.args[0], env.__getitem__)
        raise AssertionError("a graph without output")

    def _conform(self, node: fx.Node, result: Any, out: Any) -> Any:
        """Gives a translation's result the node's dtype, shape and name."""
        if isinstance(out, (tuple, list)):
            assert len(out) == len(result), node
            return tuple(
                r if r is None else self._conform(node, r, o)
                for r, o in zip(result, out, strict=True)
            )
        if not isinstance(out, Tensor):
            return result
        e = self.emitter
        assert isinstance(result, Value), (node, result)
        value = e.cast(result, out.dtype)
        e.describe(value, out.dtype, e.sizes.dims(out))
        maker = value.producer()
        if maker is not None and e.node is None and value.name == f"{node.name}_{maker.op_type}":
            e.rename(value, node.name)
        return value

    def _outputs(self, env: Mapping[fx.Node, Any]) -> list[Value]:
        """The graph's outputs under the signature's names."""
        e = self.emitter
        outputs: list[Value] = []
        leaves = self.program.graph.output_node().args[0]
        assert isinstance(leaves, tuple)
        for leaf, spec in zip(leaves, self.program.signature.outputs, strict=True):
            value = e.replaced.get(env[leaf], env[leaf])  # type: ignore[index]
            if value.producer() is None or value in outputs:
                value = e.identity(value)
            value.name = spec.name
            value.type = ir.TensorType(from_torch_dtype(spec.dtype))
            value.shape = ir.Shape(spec.shape)
            outputs.append(value)
        return outputs

    def _model(self, inputs: list[Value], outputs: list[Value]) -> ir.Model:
        nodes = alive(self.emitter.nodes, outputs)
        nodes = fold_views(nodes, self.emitter.initializers)
        if is_cached(self.program.signature) and not self.emitter.standard:
            nodes = fuse_skips(self.emitter, nodes, outputs)
        nodes = join_casts(self.emitter, nodes)
        read = {value for node in nodes for value in node.inputs}
        graph = ir.Graph(
            inputs, outputs, nodes=nodes, name=self.program.signature.task,
            initializers=[v for v in self.emitter.initializers if v in read],
            opset_imports={"": OPSET} | {node.domain: 1 for node in nodes if node.domain},
        )  # fmt: skip
        metadata = {}
        if writes_in_place(self.program.signature, inputs, outputs):
            metadata |= [IN_PLACE]
        if self.decomposed:
            metadata["decomposed"] = ", ".join(sorted(self.decomposed))
            _log.info("lowered through decompositions: %s", metadata["decomposed"])
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="ftc", metadata_props=metadata)


def _in_fp32(e: Emitter, parts: Any) -> Any:
    """bfloat16 values and fake values as fp32: onnxruntime has no kernels for it.

    That is how torch computes with bfloat16 too; results are rounded to it again.
    """

    def widen(part: Any) -> Any:
        if isinstance(part, Value) and e.dtype(part) == torch.bfloat16:
            return e.cast(part, torch.float32)
        if isinstance(part, Tensor) and part.dtype == torch.bfloat16:
            return part.to(torch.float32)
        return part

    return torch.utils._pytree.tree_map(widen, parts)
