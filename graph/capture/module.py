"""Capture: from a module and example inputs to a :class:`~ftc.graph.program.Program`.

Any ``nn.Module`` can be captured; nothing here knows an architecture. Files,
folders and task names become modules and examples in :mod:`ftc.graph.sources`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from ftc.graph.drift import compare
from ftc.graph.errors import CaptureError, UsageError
from ftc.graph.program import Program
from ftc.graph.shapes import value
from ftc.graph.signature import Dim, InputSpec, Signature

from .export import Dynamic, export
from .normalize import normalize
from .outputs import keep_named_outputs, name_output_dims
from .repeats import CannotRepeat, Repeats

Examples = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a program is captured with: see :func:`capture_module`."""

    inputs: Mapping[str, Tensor]
    dynamic: Dynamic
    task: str = "module"
    limits: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, int] = field(default_factory=dict)
    masks: Sequence[str] = ()


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
    asked = _Asked(inputs, wanted, task, limits or {}, ranges or {}, masks)
    strict = dynamic is not None
    program = _captured_once_each(model, asked, strict_dims=strict)
    if program is None:
        exported, notes = export(model, inputs, wanted, strict_dims=strict)
        program = _program(exported.module(check_guards=False), exported, asked, notes)
    return replace(program, ties=_ties(model, program.module), assets=assets)


def _captured_once_each(model: nn.Module, asked: _Asked, *, strict_dims: bool) -> Program | None:
    """The program by a trace of one layer of each kind; None where that is not the same."""
    repeats = Repeats(model)
    if not repeats:
        return None
    try:
        with repeats:
            exported, notes = export(model, asked.inputs, asked.dynamic, strict_dims=strict_dims)
        module = exported.module(check_guards=False)
        repeats.expand(module)
        program = _program(module, exported, asked, notes)
    except (CaptureError, CannotRepeat):
        return None  # a whole trace says why, or does it
    return program if _says_what_the_model_says(program, model) else None


def _says_what_the_model_says(program: Program, model: nn.Module) -> bool:
    """Whether the outputs agree to rounding on random inputs of other sizes than the example's."""
    given = program.signature.probe(seed=0, **dict.fromkeys(program.signature.dims[:1], 3))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            said = model(**given)
            found = program(given)
    except (RuntimeError, IndexError, ValueError):
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    leaves = [leaf for leaf in tree_leaves(said) if isinstance(leaf, Tensor)]
    names = program.signature.output_names
    expected = dict(said) if isinstance(said, Mapping) else dict(zip(names, leaves, strict=False))
    differences = compare(expected, found, given, program.signature)
    return len(differences) == len(names) and all(d.is_rounding for d in differences.values())


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
    module = exported.module(check_guards=False)
    program = _program(module, exported, _Asked(inputs, dynamic, task), ())
    modes = {
        n.args[2]
        for n in exported.graph.nodes
        if n.op == "call_function" and n.target is torch.ops.aten.dropout.default
    }
    notes = ("exported in eval mode: attention's dropout is not known",) if modes == {False} else ()
    return replace(program, notes=notes)


def _program(
    module: fx.GraphModule,
    exported: ExportedProgram,
    asked: _Asked,
    notes: Sequence[str],
) -> Program:
    """The normalised graph of an exported program's module, and its signature."""
    module = normalize(module)
    _keep_tensor_inputs(module.graph)
    outputs = keep_named_outputs(module.graph, exported)
    signature = Signature(
        task=asked.task,
        inputs=tuple(_input_spec(n, asked) for n in module.graph.nodes if n.op == "placeholder"),
        outputs=tuple(outputs),
        limits=dict(asked.limits),
    )
    signature = name_output_dims(module.graph, signature)
    module.recompile()
    return Program(module, signature, notes=tuple(notes))


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


def _input_spec(node: fx.Node, asked: _Asked) -> InputSpec:
    # fx renames a node whose name Python knows (``input``); its target keeps the model's name.
    name = str(node.target)
    example = asked.inputs[name]
    axes = asked.dynamic.get(name, {})
    val = value(node)
    shape: tuple[Dim, ...] = tuple(
        axes[i] if i in axes and not isinstance(val.shape[i], int) else int(size)
        for i, size in enumerate(example.shape)
    )
    integer = not example.dtype.is_floating_point and example.dtype != torch.bool
    high = asked.ranges.get(name, int(example.max()) + 1 if integer else 2)
    return InputSpec(
        name, example.dtype, shape, high=high, role="mask" if name in asked.masks else "value"
    )


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
