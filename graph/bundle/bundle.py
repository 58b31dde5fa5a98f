"""A program on disk: a folder that a person can read and that nobody can make run code.

================= ==========================================================
ftc.json          format, versions, signature, ties, history, notes, the size and
                  sha256 of every other file, and, of a program that generates, the
                  class of its tokenizer
graph.json        the nodes, and what is known of each tensor
model.safetensors the tensors
tokenizer files   as they came with the model
================= ==========================================================

Writing is all or nothing (:mod:`ftc.graph.bundle.replace_folder`), reading checks every
hash and every node first (:mod:`ftc.graph.bundle.graph_json`), and the same program
gives the same bytes. Symbolic shapes are not kept: they are recomputed on demand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ftc.graph.cache_inputs import misfit
from ftc.graph.cached import is_cached
from ftc.graph.errors import BundleError
from ftc.graph.program import Program, build_module
from ftc.graph.signature import Signature, dtype_name

from .graph_json import check_tensor_name, decode_graph, encode_graph
from .head import FORMAT, GRAPH, WEIGHTS, check_files, hash_file, own_version, read_head, read_json
from .output import HEAD, cannot_write, check_output
from .record_json import decode_record, decode_texts
from .replace_folder import write_folder
from .signature_json import decode_signature, encode_signature
from .tensor_file import describe_tensors, read_tensors, write_tensors


def save_bundle(
    program: Program,
    path: str | Path,
    *,
    force: bool = False,
    files: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Writes ``program`` as the folder ``path``.

    Args:
        program: any program whose operators a bundle may hold.
        path: the folder; it must not exist, or be empty, or be a bundle and ``force`` given.
        force: replace a bundle that is there. Until the new one is whole, the old one stays.
        files: more files of the bundle: name -> a function that writes it at the path it gets.

    Returns:
        The absolute path of the folder.

    Raises:
        UsageError: when ``path`` exists and may not be replaced.
        BundleError: when the program cannot be saved; ``path`` is as before.
        WriteError: when the disk is full or the place cannot be written to; likewise.
    """
    target = Path(path).expanduser().resolve()
    check_output(target, force=force)
    try:
        write_folder(target, lambda folder: _fill(folder, program, files or {}))
    except OSError as error:
        raise cannot_write(error, target) from error
    return target


def _fill(folder: Path, program: Program, files: Mapping[str, Callable[[Path], None]]) -> None:
    facts, tensors = describe_tensors(program)
    for name in facts:
        check_tensor_name(name)
    nodes = encode_graph(program.graph)
    from ftc.graph.sources.tokenizer import copy_assets, tokenizer_class  # sources reads bundles

    notes = copy_assets(program.assets, folder)
    kind = tokenizer_class(folder) if is_cached(program.signature) else None
    _write_lines(folder / GRAPH, {"nodes": nodes, "tensors": facts})
    hashes = {WEIGHTS: write_tensors(folder / WEIGHTS, tensors)}
    for name, write in files.items():
        assert name not in (HEAD, GRAPH, WEIGHTS), name
        write(folder / name)
    listed = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        listed[name] = {"bytes": file.stat().st_size, "sha256": hashes.get(name) or hash_file(file)}
    head = {
        "format": FORMAT,
        "ftc": own_version(),
        "torch": torch.__version__.split("+")[0],
        "signature": encode_signature(program.signature),
        "ties": sorted(sorted(names) for names in program.ties),
        "history": [asdict(record) for record in program.history],
        "notes": [*program.notes, *notes],
        "files": listed,
        **({"tokenizer": kind} if kind else {}),
    }
    (folder / HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def load_bundle(path: str | Path, *, checked: bool = False) -> Program:
    """Reads a bundle; nothing in it is run, and weights are mapped: read when they are used.

    Args:
        path: the folder.
        checked: another process has just compared every file with its hash.

    Raises:
        BundleError: naming the file that is missing, damaged, forged or of a later format.
    """
    folder = Path(path).expanduser().resolve()
    head = read_head(folder)
    try:
        if not checked:
            check_files(folder, head["files"])
        stored = read_json(folder / GRAPH)
        signature = decode_signature(head["signature"])
        graph = decode_graph(stored["nodes"])
        facts = {check_tensor_name(name): fact for name, fact in stored["tensors"].items()}
        tensors = read_tensors(folder / WEIGHTS, facts)
        _check_fit(graph, signature, tensors)
        module = build_module(tensors, graph)
        return Program(
            module=module,
            signature=signature,
            ties=tuple(
                frozenset(decode_texts(t, f"ties[{i}]")) for i, t in enumerate(head["ties"])
            ),
            history=tuple(
                decode_record(record, f"history[{i}]") for i, record in enumerate(head["history"])
            ),
            assets=folder,
            notes=decode_texts(head["notes"], "notes"),
        )
    except BundleError as error:
        raise BundleError(error.what, where=error.where or str(folder), fix=error.fix) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SyntaxError) as error:
        raise BundleError(
            f"{folder} is malformed: {type(error).__name__}: {error}", fix="make the bundle again"
        ) from None


def _check_fit(graph: fx.Graph, signature: Signature, tensors: Mapping[str, Any]) -> None:
    """Whether graph, signature and tensors belong together."""
    inputs = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    if len(inputs) != len(signature.inputs) or not all(map(_names, inputs, signature.input_names)):
        raise BundleError(f"the graph takes {inputs}, the signature says {signature.input_names}")
    leaves = graph.output_node().args[0]
    assert isinstance(leaves, tuple)
    if len(leaves) != len(signature.outputs):
        raise BundleError(
            f"the graph returns {len(leaves)} tensors, the signature says {len(signature.outputs)}"
        )
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    read.update(signature.start.values())
    if odd := sorted(read ^ set(tensors)):
        raise BundleError(f"graph and {WEIGHTS} disagree about the tensor {odd[0]}")
    begins = {n: tensors[n] for n in signature.start.values()}
    kinds = {n: (dtype_name(t.dtype), t.shape) for n, t in begins.items()}
    if kinds and (odd_input := misfit(encode_signature(signature), kinds)):
        raise BundleError(f"signature.start: no run can begin behind what it has for {odd_input}")


def _names(node: str, given: str) -> bool:
    """Whether a node is that of the input ``given``: torch numbers one named like a builtin."""
    return node == given or bool(re.fullmatch(rf"{re.escape(given)}_\d+", node))


def _write_lines(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with one node or tensor a line: small, and a diff of two shows what changed."""

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    nodes = ",\n".join(line(node) for node in content["nodes"])
    tensors = ",\n".join(f"{line(k)}:{line(v)}" for k, v in content["tensors"].items())
    path.write_text(f'{{"nodes":[\n{nodes}\n],"tensors":{{\n{tensors}\n}}}}\n', encoding="utf-8")
