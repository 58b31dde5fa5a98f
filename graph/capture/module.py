"""Capture: from a module and example inputs to a :class:`~ftc.graph.program.Program`.

Any ``nn.Module`` can be captured; nothing here knows an architecture. Files,
folders and task names become modules and examples in :mod:`ftc.graph.sources`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ftc.graph.errors import CaptureError, UsageError
from ftc.graph.program import Program, detach
from ftc.graph.shapes import value
from ftc.graph.signature import Dim, InputSpec, OutputSpec, Signature

from .export import Dynamic, export
from .normalize import normalize

Examples = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def capture_module(
    model: nn.Module,
    examples: Examples,
    *,
    dynamic: Dynamic | None = None,
    task: str = "module",
    limits: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
    masks: Sequence[str] = (),
    assets: Path | None = None,
) -> Program:
    """Captures ``model`` as a program.

    Args:
        model: any module that torch.export can trace.
        examples: its inputs, by position or by name.
        dynamic: ``{input: {axis: name}}``. By default axis 0 of every input is
            ``batch``; where the inputs allow no dynamic batch, it is fixed and a
            note says so.
        task: recorded in the signature.
        limits: largest size of a dynamic dimension.
        ranges: for integer inputs, one more than the largest legal value;
            by default one more than the largest in the example.
        masks: names of inputs that are attention masks.
        assets: folder whose tokenizer and configuration files belong to the model.

    Raises:
        CaptureError: when the model cannot be traced, with its source line.
        UsageError: for examples that do not fit the model's forward.
    """
    inputs = _named(model, examples)
    wanted = (
        dynamic if dynamic is not None else {n: {0: "batch"} for n, t in inputs.items() if t.dim()}
    )
    _check_sizes(inputs, wanted)
    exported, notes = export(model, inputs, wanted, strict_dims=dynamic is not None)
    program = _program(exported, inputs, wanted, task, limits or {}, ranges or {}, masks)
    return replace(program, ties=_ties(model, program.module), assets=assets, notes=tuple(notes))


def capture_exported(exported: ExportedProgram, *, task: str = "module") -> Program:
    """A program from what torch.export has already traced, without tracing again.

    Its dynamic dimensions keep no names: axis 0 is called ``batch``, others ``dim_1``, …

    Raises:
        CaptureError: when it carries no example inputs, or other inputs than tensors.
    """
    examples = torch.utils._pytree.tree_leaves(exported.example_inputs)
    names = exported.graph_signature.user_inputs
    if len(examples) != len(names) or not all(isinstance(e, Tensor) for e in examples):
        raise CaptureError(
            "the exported program has no example inputs of tensors alone",
            fix="export the model with tensors only",
        )
    inputs = dict(zip(map(str, names), examples, strict=True))
    fakes = {n.name: value(n) for n in exported.graph.nodes if n.name in inputs}
    symbols: dict[str, str] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for name, fake in fakes.items():
        for axis, size in enumerate(fake.shape):
            if not isinstance(size, int):
                fresh = f"dim_{len(symbols)}" if axis or "batch" in symbols.values() else "batch"
                dynamic.setdefault(name, {})[axis] = symbols.setdefault(str(size), fresh)
    program = _program(exported, inputs, dynamic, task, {}, {}, ())
    modes = {
        n.args[2]
        for n in exported.graph.nodes
        if n.op == "call_function" and n.target is torch.ops.aten.dropout.default
    }
    notes = ("exported in eval mode: attention's dropout is not known",) if modes == {False} else ()
    return replace(program, notes=notes)


def drop_outputs(program: Program, untrained: frozenset[str]) -> Program:
    """Without the outputs that are computed from parameters in ``untrained``, unless all are.

    Returns:
        The program itself where nothing can be dropped, else one with a note.
    """
    tainted: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            spoilt = str(node.target) in untrained
        else:
            spoilt = node.op != "output" and not tainted.isdisjoint(node.all_input_nodes)
        if spoilt:
            tainted.add(node)
    output = program.graph.output_node()
    pairs = list(zip(program.signature.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
    kept = [(spec, leaf) for spec, leaf in pairs if leaf not in tainted]
    if not kept or len(kept) == len(pairs):
        return program
    output.args = (tuple(leaf for _, leaf in kept),)
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name, _ in list(program.tensors()):
        if name not in read:
            detach(program.module, name)
    program.module.recompile()
    dropped = ", ".join(spec.name for spec, leaf in pairs if leaf in tainted)
    signature = replace(program.signature, outputs=tuple(spec for spec, _ in kept))
    note = f"dropped the output {dropped}: the weights for it were never trained"
    return replace(program, signature=signature, notes=(*program.notes, note))


def _program(
    exported: ExportedProgram,
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic,
    task: str,
    limits: Mapping[str, int],
    ranges: Mapping[str, int],
    masks: Sequence[str],
) -> Program:
    """The normalised graph of an exported program, and its signature."""
    module = normalize(exported.module(check_guards=False))
    _keep_tensor_inputs(module.graph)
    outputs = _keep_named_outputs(module.graph, exported)
    signature = Signature(
        task=task,
        inputs=tuple(
            _input_spec(n, inputs, dynamic, ranges, masks)
            for n in module.graph.nodes
            if n.op == "placeholder"
        ),
        outputs=tuple(outputs),
        limits=dict(limits),
    )
    signature = _name_output_dims(module.graph, signature)
    module.recompile()
    return Program(module, signature)


def _named(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """Example inputs by the names of ``forward``'s parameters."""
    if isinstance(examples, Mapping):
        named = dict(examples)
    else:
        args = [examples] if isinstance(examples, Tensor) else list(examples)
        try:
            bound = inspect.signature(model.forward).bind(*args)
        except TypeError as error:
            what = f"the examples do not fit {type(model).__name__}.forward: {error}"
            raise UsageError(what) from None
        named = dict(bound.arguments)
    for name, given in named.items():
        if not isinstance(given, Tensor):
            raise UsageError(
                f"example input {name!r} is a {type(given).__name__}, not a tensor",
                fix="bind constants in a wrapper module; pass variadic inputs by name",
            )
    return named


def _check_sizes(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> None:
    for name, axes in dynamic.items():
        if name not in inputs:
            raise UsageError(
                f"dynamic names the unknown input {name!r}", fix=f"inputs: {', '.join(inputs)}"
            )
        for axis, dim in axes.items():
            if inputs[name].shape[axis] < 2:
                raise UsageError(
                    f"the example's {name!r} has size {inputs[name].shape[axis]} along {dim!r}",
                    fix="give an example of size 2 or more there: torch.export fixes sizes 0 and 1",
                )


def _keep_tensor_inputs(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            if node.users:
                raise CaptureError(f"input {node.name!r} is not a tensor and is computed with")
            graph.erase_node(node)


def _keep_named_outputs(graph: fx.Graph, exported: ExportedProgram) -> list[OutputSpec]:
    """Keeps the top-level tensors of the model's output, in order, and names them.

    A cache or a tuple of hidden states is nested and dropped: a program returns
    what it was captured for.
    """
    node = graph.output_node()
    leaves = node.args[0]
    assert isinstance(leaves, tuple)
    spec = exported.call_spec.out_spec
    tree = torch.utils._pytree.tree_unflatten(list(range(len(leaves))), spec)
    if isinstance(tree, int):
        named: dict[str, Any] = {"output": tree}
    elif isinstance(tree, Mapping):
        named = dict(tree)
    elif isinstance(tree, (tuple, list)):
        named = {f"output_{i}": leaf for i, leaf in enumerate(tree)}
    else:
        raise CaptureError(
            f"the model returns a {type(tree).__name__}",
            fix="return a tensor, a tuple of tensors or a dict of tensors",
        )
    found = {name: leaves[i] for name, i in named.items() if isinstance(i, int)}
    kept = {
        name: leaf
        for name, leaf in found.items()
        if isinstance(leaf, fx.Node) and isinstance(value(leaf), Tensor)
    }
    if not kept:
        raise CaptureError("the model returns no tensor", fix="return a tensor or a dict")
    node.args = (tuple(kept.values()),)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return [OutputSpec(name, value(leaf).dtype, ()) for name, leaf in kept.items()]


def _input_spec(
    node: fx.Node,
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic,
    ranges: Mapping[str, int],
    masks: Sequence[str],
) -> InputSpec:
    # fx renames a node whose name Python knows (``input``); its target keeps the model's name.
    name = str(node.target)
    example = inputs[name]
    axes = dynamic.get(name, {})
    val = value(node)
    shape: tuple[Dim, ...] = tuple(
        axes[i] if i in axes and not isinstance(val.shape[i], int) else int(size)
        for i, size in enumerate(example.shape)
    )
    integer = not example.dtype.is_floating_point and example.dtype != torch.bool
    high = ranges.get(name, int(example.max()) + 1 if integer else 2)
    return InputSpec(
        name, example.dtype, shape, high=high, role="mask" if name in masks else "value"
    )


def _name_output_dims(graph: fx.Graph, signature: Signature) -> Signature:
    """Fills the outputs' shapes; a symbol that is an input's dimension gets its name."""
    names: dict[str, str] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, signature.inputs, strict=True):
        for size, dim in zip(value(node).shape, spec.shape, strict=True):
            if isinstance(dim, str):
                names.setdefault(str(size), dim)
    leaves = graph.output_node().args[0]
    outputs = tuple(
        OutputSpec(
            o.name,
            o.dtype,
            tuple(
                s if isinstance(s, int) else names.get(str(s), str(s)) for s in value(leaf).shape
            ),
        )
        for o, leaf in zip(signature.outputs, leaves, strict=True)  # type: ignore[arg-type]
    )
    return Signature(signature.task, signature.inputs, outputs, signature.limits)


def _ties(model: nn.Module, module: fx.GraphModule) -> tuple[frozenset[str], ...]:
    """Sets of names of one tensor, where the graph reads one of them."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    read = {name for name, _ in module.named_parameters()}
    return tuple(
        frozenset(names)
        for names in by_id.values()
        if len(names) > 1 and not read.isdisjoint(names)
    )
