"""``ftc export --stages``: a partitioned program as one ONNX file a stage, proven in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftc.graph.bundle import cannot_write, check_parents, is_bundle, write_folder
from ftc.graph.cut import Stage, cut
from ftc.graph.errors import UsageError
from ftc.graph.program import Drift, Program
from ftc.graph.sources import capture
from ftc.passes.context import Context

from .export import Export
from .lower import Dialect, decomposed, lower, save_onnx
from .parity import check_parity
from .staged import MANIFEST, Manifest, StagedModel, StageEntry, file_hash, read_manifest


def export_stages(
    source: str,
    out: Path,
    *,
    force: bool = False,
    task: str | None = None,
    trust: bool = False,
    dialect: Dialect = "onnxruntime",
    progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Lowers each stage that ``partition`` left, once onnxruntime has agreed with the whole graph.

    Args:
        source: a bundle with stages.
        out: a folder that gets the files and ``stages.json``.
        force: replace a folder of stages that is there.
        task, trust: as for capture.
        dialect: ``standard`` for standard operators only.
        progress: told what runs.

    Raises:
        UsageError: when the program has no stages, or the folder may not be replaced.
        WriteError: when the disk is full.
        FtcError: as capture, lowering and parity raise it. Nothing is written in any case.
    """
    target = out.expanduser().resolve()
    _check_place(target, force)
    progress(f"reading {source}")
    program = capture(source, task=task, trust=trust)
    stages = cut(program)
    if len(stages) < 2:
        raise UsageError(f"{source} has no stages",
                         fix=f"ftc compile {source} --passes 'partition{{stages=4}}'")  # fmt: skip
    made: list[tuple[Drift, tuple[str, ...]]] = []

    def fill(folder: Path) -> None:
        found = _lower_all(program, stages, folder, dialect, progress)
        progress("comparing onnxruntime with the graph")
        made.append((_parity(program, StagedModel(folder)), found))

    try:
        write_folder(target, fill)
    except OSError as error:
        raise cannot_write(error, target) from error
    (drift, used), size = made[0], sum(f.stat().st_size for f in target.iterdir())
    return Export(source, str(target), size, drift, used)


def _lower_all(
    program: Program, stages: Sequence[Stage], folder: Path, dialect: Dialect,
    progress: Callable[[str], None],
) -> tuple[str, ...]:  # fmt: skip
    """Writes every stage and the manifest; operators lowered through their decomposition."""
    entries, used = [], set[str]()
    for stage in stages:
        progress(f"lowering stage {stage.index} of {len(stages)} to ONNX")
        relays = [name for name in stage.sent if name in stage.received]
        program_of = _without(stage.program, relays)
        model = lower(program_of, dialect)
        path = folder / f"stage-{stage.index}.onnx"
        save_onnx(model, path)
        used.update(decomposed(model))
        read = [name for name in stage.received if name in program_of.signature.input_names]
        sent = [name for name in stage.sent if name not in relays]
        entries.append(StageEntry(path.name, file_hash(path), stage.inputs, tuple(read),
                                  tuple(relays), tuple(sent), stage.outputs))  # fmt: skip
    files = tuple(sorted(file.name for file in folder.iterdir()))
    signature = program.signature
    Manifest(signature.input_names, signature.output_names, tuple(entries), files).write(folder)
    return tuple(sorted(used))


def _without(program: Program, relays: Sequence[str]) -> Program:
    """A stage without the values that it only hands on: no file can return its own input."""
    clone = program.clone()
    graph, signature = clone.graph, clone.signature
    output: Any = graph.output_node()
    kept = [(value, spec) for value, spec in zip(output.args[0], signature.outputs, strict=True)
            if spec.name not in relays]  # fmt: skip
    output.args = (tuple(value for value, _ in kept),)
    inputs = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.inputs, strict=True):
        if node.users or spec.name not in relays:
            inputs.append(spec)
        else:
            graph.erase_node(node)
    outputs = tuple(spec for _, spec in kept)
    return replace(clone, signature=replace(signature, inputs=tuple(inputs), outputs=outputs))


def _parity(program: Program, model: StagedModel) -> Drift:
    ctx = Context.for_program(program)
    outputs = [model(probe) for probe in ctx.probes]
    return check_parity(program, ctx.outputs(program), outputs, ctx.probes, ctx.probe_source)


def _check_place(target: Path, force: bool) -> None:
    """Refuses a place whose files are somebody else's."""
    check_parents(target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file", fix="choose a folder")
    if is_bundle(target):
        raise UsageError(f"{target} is a bundle", fix="choose another place")
    there = {file.name for file in target.iterdir()} if target.exists() else set()
    if not there:
        return
    if MANIFEST not in there:
        raise UsageError(f"{target} exists, and is no folder of stages", fix="choose another place")
    if foreign := sorted(there - {MANIFEST, *read_manifest(target).files}):
        raise UsageError(f"{target / foreign[0]} is no part of the stages, and would be deleted",
                         fix="move it, or choose another place")  # fmt: skip
    if not force:
        raise UsageError(f"{target} exists", fix="use --force to replace it")
