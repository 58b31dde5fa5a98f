"""Where models come from: one call for folders, files, hub ids, factories and modules.

Files are data, never programs: pickles are refused, a bundle is checked, remote
code is not run, and the network is used only for a hub id that the user wrote.
The two exceptions run code that the user names: ``package.module:factory``, and
a ``.pt2`` archive with ``trust=True``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ftc.graph.bundle import is_bundle, load_bundle
from ftc.graph.capture import Examples, capture_exported, capture_module, drop_outputs
from ftc.graph.capture.export import Dynamic
from ftc.graph.errors import CaptureError, SourceError, UsageError, nearest
from ftc.graph.program import Program

from .experts import dense_experts
from .factory import call_factory, is_factory
from .inputs import Inputs, default_inputs, missing_inputs
from .padding import take_padding
from .safety import PICKLES, refuse_pickle
from .tasks import FEATURES, check_task

if TYPE_CHECKING:
    from .huggingface import Loaded

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def capture(
    source: str | os.PathLike[str] | nn.Module,
    *,
    task: str | None = None,
    examples: Examples | None = None,
    dynamic: Dynamic | None = None,
    limits: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
    masks: Sequence[str] = (),
    trust: bool = False,
) -> Program:
    """Captures a model, wherever it is.

    Args:
        source: a model folder of transformers (config.json, safetensors), a hub id
            ``org/name``, a GGUF file or a folder with exactly one, a bundle, a
            ``.pt2`` archive (with ``trust``), ``package.module:factory`` (returns a
            module, or a module and examples), or a module.
        task: what to compute; by default what the folder's ``architectures`` says.
        examples: example inputs. Needed for a module; files have defaults.
        dynamic, limits, ranges, masks: see :func:`ftc.graph.capture.capture_module`;
            for a model of transformers they come from its configuration.
        trust: allow a ``.pt2`` archive, which runs code of its author's.

    Raises:
        SourceError: when the source cannot be read, or must not be.
        UsageError: for a task that does not exist or does not fit, or missing examples.
        CaptureError: when the model does not trace.
        BundleError: when a bundle is damaged.
    """
    check_task(task)
    if isinstance(source, nn.Module):
        return _module(source, examples, task, dynamic, limits, ranges, masks)
    text = os.fspath(source)
    path = Path(text).expanduser()
    if not path.exists():
        if isinstance(source, str) and is_factory(text):
            module, found = call_factory(text)
            given = examples if examples is not None else found
            return _module(module, given, task, dynamic, limits, ranges, masks, name=text)
        if isinstance(source, str) and _is_hub_id(text):
            path = _download(text)
        else:
            raise _missing(path)
    path = path.resolve()
    if is_bundle(path):
        return _bundle(path, task)
    if path.suffix == ".pt2" and path.is_file():
        return _archive(path, task, trust)
    return _files(path, task, examples, dynamic)


def _module(
    module: nn.Module,
    examples: Examples | None,
    task: str | None,
    dynamic: Dynamic | None,
    limits: Mapping[str, int] | None,
    ranges: Mapping[str, int] | None,
    masks: Sequence[str],
    name: str = "",
) -> Program:
    if examples is None:
        what = f"{name} returns no example inputs" if name else "a module needs example inputs"
        fix = (
            "return (module, examples) from the factory"
            if name
            else "capture(module, examples={name: tensor, ...})"
        )
        raise UsageError(what, fix=fix)
    with dense_experts(module) as notes:
        program = capture_module(
            module,
            examples,
            dynamic=dynamic,
            task=task or "module",
            limits=limits,
            ranges=ranges,
            masks=masks,
        )
    return replace(program, notes=(*notes, *program.notes))


def _files(
    path: Path, task: str | None, examples: Examples | None, dynamic: Dynamic | None
) -> Program:
    """A folder of transformers or a GGUF file."""
    from .gguf import load_gguf
    from .huggingface import check_missing, load_folder

    file = path if path.is_file() else _model_file(path)
    if file.suffix == ".gguf":
        loaded, assets = load_gguf(file, task), file
    elif file.name == "config.json":
        loaded, assets = load_folder(file.parent, task), file.parent
    else:
        raise _unreadable(file)
    program = _pretrained(loaded, assets, examples, dynamic)
    if loaded.task == FEATURES and loaded.missing:
        program = drop_outputs(program, loaded.missing)
    read = frozenset(name for name, _ in program.tensors())
    check_missing(loaded, read, str(path))
    return replace(program, notes=(*loaded.notes, *program.notes))


def _pretrained(
    loaded: Loaded, assets: Path, examples: Examples | None, dynamic: Dynamic | None
) -> Program:
    """The program of a model of transformers, on its default inputs where none are given."""
    inputs = _inputs(loaded, assets, examples)
    traced = partial(
        capture_module,
        loaded.model,
        inputs.examples if examples is None else examples,
        dynamic=dynamic or (inputs.dynamic if examples is None else None),
        task=loaded.task,
        limits=inputs.limits,
        ranges=inputs.ranges,
        masks=inputs.masks,
        assets=assets,
    )
    notes = inputs.notes
    with dense_experts(loaded.model) as note:
        notes += note
        try:
            program = traced()
        except CaptureError as error:
            if not (padding := take_padding(loaded.model, assets, error)):
                raise missing_inputs(loaded.model, inputs, error) from error
            notes += padding
            program = traced()
    return replace(program, notes=(*notes, *program.notes))


def _inputs(loaded: Loaded, assets: Path, examples: Examples | None) -> Inputs:
    """What the model's inputs look like; nothing, where only the caller's examples tell."""
    try:
        return default_inputs(
            loaded.model, loaded.task, assets.parent if assets.is_file() else assets
        )
    except SourceError:
        if examples is None:
            raise
        return Inputs({}, {})


def _model_file(folder: Path) -> Path:
    """The file that says what a folder is.

    Raises:
        SourceError: when nothing there is a model, or it is not clear which.
    """
    if (folder / "config.json").is_file():
        return folder / "config.json"
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise SourceError(
            f"{folder} has {len(found)} GGUF files",
            fix=f"name one: {', '.join(str(f) for f in found[:4])}",
        )
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise refuse_pickle(pickles[0])
    if weights := sorted(p.name for p in folder.glob("*.safetensors")):
        raise SourceError(
            f"{folder} has {weights[0]} but no config.json",
            fix="copy config.json from where the weights come from",
        )
    inner = sorted(p.parent for p in folder.glob("*/config.json"))
    raise SourceError(
        f"{folder} holds no model: neither config.json, nor ftc.json, nor a GGUF file",
        fix=f"did you mean {inner[0]}?" if inner else "name the folder with the config.json",
    )


def _unreadable(file: Path) -> SourceError:
    if file.suffix in PICKLES:
        return refuse_pickle(file)
    if file.suffix in (".safetensors", ".json"):
        return SourceError(f"{file} alone is no model", fix=f"name its folder: {file.parent}")
    return SourceError(
        f"{file} is of no kind that can be captured",
        fix="name a folder with config.json, a .gguf file, a bundle or a .pt2 archive",
    )


def _bundle(path: Path, task: str | None) -> Program:
    program = load_bundle(path)
    if task not in (None, program.signature.task):
        raise UsageError(
            f"{path} was captured for {program.signature.task}, not for {task}",
            fix="capture the original model again, or leave the task out",
        )
    return program


def _archive(path: Path, task: str | None, trust: bool) -> Program:
    """A program saved by torch.export."""
    if not trust:
        raise SourceError(
            f"{path} is an archive of torch.export: loading one runs code that the archive"
            " controls (pickled inputs, guard expressions)",
            fix="use --trust if you made it yourself; else ask for safetensors",
        )
    try:
        exported = torch.export.load(path)
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {error}", fix="export it again") from error
    return capture_exported(exported, task=task or "module")


def _is_hub_id(text: str) -> bool:
    """``org/name``, unless it looks like a path: its folder exists, or it names a file."""
    parent = text.split("/")[0]
    known = (".gguf", ".pt2", ".safetensors", ".json", *PICKLES)
    return bool(_HUB.fullmatch(text)) and not Path(parent).exists() and not text.endswith(known)


def _download(name: str) -> Path:
    """Fetches those files of a hub repository that are data, into the cache of the hub."""
    from huggingface_hub import snapshot_download

    from .quiet import quiet
    from .tokenizer import ASSETS

    wanted = [*ASSETS, "*.safetensors", "*.safetensors.index.json"]
    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise SourceError(
            f"{name} is no folder here, and as a hub id it cannot be fetched: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            fix="check the name and the network, or give the path of a folder",
        ) from error


def _missing(path: Path) -> SourceError:
    parent = path.parent
    if parent.is_dir():
        names = [p.name for p in parent.iterdir() if not p.name.startswith(".")
                 and (p.is_dir() or p.suffix in (".gguf", ".pt2"))]  # fmt: skip
        fix = nearest(path.name, names[:50])
    else:
        fix = f"there is no folder {parent} either"
    if len(path.parts) == 1 and not path.suffix:
        fix += "; for a hub id, write org/name"
    return SourceError(f"there is no {path}", fix=fix)
