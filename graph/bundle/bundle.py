"""A program on disk: a folder that a person can read and that nobody can make run code.

================= ==========================================================
ftc.json          format, versions, signature, ties, history, notes, and the
                  size and sha256 of every other file
graph.json        the nodes, and what is known of each tensor
model.safetensors the tensors
tokenizer files   as they came with the model
================= ==========================================================

Writing is all or nothing (:mod:`ftc.graph.bundle.replace_folder`), reading checks every
hash and every node first (:mod:`ftc.graph.bundle.graph_json`), and the same program
gives the same bytes. Symbolic shapes are not kept: they are recomputed on demand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ftc.graph.cached import misfit
from ftc.graph.errors import BundleError
from ftc.graph.program import Program, build_module
from ftc.graph.signature import Signature

from .graph_json import check_tensor_name, decode_graph, encode_graph
from .output import HEAD as _HEAD
from .output import cannot_write, check_output, is_bundle
from .record_json import decode_record, decode_texts
from .replace_folder import write_folder
from .signature_json import decode_signature, encode_signature
from .tensor_file import describe_tensors, read_tensors, write_tensors

FORMAT = 1
_GRAPH, _WEIGHTS = "graph.json", "model.safetensors"


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
    from ftc.graph.sources.tokenizer import copy_assets  # sources reads bundles

    notes = copy_assets(program.assets, folder)
    _write_lines(folder / _GRAPH, {"nodes": nodes, "tensors": facts})
    hashes = {_WEIGHTS: write_tensors(folder / _WEIGHTS, tensors)}
    for name, write in files.items():
        assert name not in (_HEAD, _GRAPH, _WEIGHTS), name
        write(folder / name)
    listed = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        listed[name] = {"bytes": file.stat().st_size, "sha256": hashes.get(name) or _hash(file)}
    head = {
        "format": FORMAT,
        "ftc": _own_version(),
        "torch": torch.__version__.split("+")[0],
        "signature": encode_signature(program.signature),
        "ties": sorted(sorted(names) for names in program.ties),
        "history": [asdict(record) for record in program.history],
        "notes": [*program.notes, *notes],
        "files": listed,
    }
    (folder / _HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def load_bundle(path: str | Path, *, checked: bool = False) -> Program:
    """Reads a bundle; nothing in it is run, and weights are mapped: read when they are used.

    Args:
        path: the folder.
        checked: another process has just compared every file with its hash.

    Raises:
        BundleError: naming the file that is missing, damaged, forged or of a later format.
    """
    folder = Path(path).expanduser().resolve()
    if not is_bundle(folder):
        raise BundleError(
            f"{folder} is no bundle: it has no {_HEAD}",
            fix="name the folder that `ftc compile` wrote",
        )
    head = _read_json(folder / _HEAD)
    _check_format(head, folder)
    try:
        if not checked:
            _check_files(folder, head["files"])
        stored = _read_json(folder / _GRAPH)
        signature = decode_signature(head["signature"])
        graph = decode_graph(stored["nodes"])
        facts = {check_tensor_name(name): fact for name, fact in stored["tensors"].items()}
        tensors = read_tensors(folder / _WEIGHTS, facts)
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


def _check_format(head: dict[str, Any], folder: Path) -> None:
    number = head.get("format")
    if not isinstance(number, int) or number < 1:
        raise BundleError(f"{folder / _HEAD} names no format", fix="make the bundle again")
    if number > FORMAT:
        raise BundleError(
            f"{folder} is of format {number}, written by ftc {head.get('ftc')}; this is ftc"
            f" {_own_version()}, which reads up to format {FORMAT}",
            fix=f"pip install 'ftc>={head.get('ftc')}'",
        )


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name in (_GRAPH, _WEIGHTS):
        if name not in files:
            raise BundleError(f"{folder / _HEAD} does not list {name}")
    for name, expected in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{folder / _HEAD} lists a file outside the bundle: {name!r}")
        if not file.is_file():
            raise BundleError(f"{file} is missing", fix="copy the whole folder again")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise BundleError(
                f"{file} has {size:,} bytes, not {expected['bytes']:,}",
                fix="copy it again; if you changed it, make the bundle again",
            )
        if _hash(file) != expected["sha256"]:
            raise BundleError(
                f"{file} does not have the hash that {_HEAD} says",
                fix="copy it again; if you changed it, make the bundle again",
            )


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
        raise BundleError(f"graph and {_WEIGHTS} disagree about the tensor {odd[0]}")
    if signature.start and (odd_input := misfit(signature, tensors)):
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


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix="make the bundle again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} is not a JSON object", fix="make the bundle again")
    return content


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_version() -> str:
    try:
        return version("ftc")
    except PackageNotFoundError:
        return "0"
