"""Folders in the layout of transformers: config.json beside safetensors.

transformers reads them; what is added here is that nothing else happens: no
network unless a hub id was named, no remote code, no pickles, no attention
kernels that a configuration names, no progress bars, and no weights made up in
silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftc.graph.bundle.tensor_file import aligned
from ftc.graph.errors import SourceError, UsageError, nearest
from ftc.graph.json_file import read_object
from ftc.graph.words import listed

from .quiet import first_line, quiet
from .safety import load_torch, weight_files
from .tasks import FEATURES, auto_class, default_task, model_class, supports


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what is known about where it came from.

    Attributes:
        model: in fp32, in eval mode.
        task: the task it was loaded for.
        missing: names of parameters that its files do not have and that are random.
        notes: what had to be decided.
    """

    model: nn.Module
    task: str
    missing: frozenset[str]
    notes: tuple[str, ...] = ()


def load_folder(folder: Path, task: str | None) -> Loaded:
    """Loads the model of a folder in fp32.

    Raises:
        SourceError: naming the file that is missing or broken.
        UsageError: when the model has no such task.
    """
    config = read_config(folder)
    kind, files = weight_files(folder)
    task, notes = choose_task(config, task)
    arguments: dict[str, Any]
    if kind == "safetensors":
        arguments = {"use_safetensors": True, "local_files_only": True}
        place: Any = folder
    else:
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            weights.update(load_torch(file))
        arguments, place = {"state_dict": weights}, None
    return build(place, config, task, notes, where=str(folder), **arguments)


def build(
    place: Path | None,
    config: Any,
    task: str,
    notes: tuple[str, ...],
    *,
    where: str,
    **arguments: Any,
) -> Loaded:
    """``from_pretrained`` of the task's class, quietly; the encoder of an encoder-decoder."""
    forget_caches(config)
    try:
        with quiet():
            # With a state_dict instead of files the auto class does not dispatch: go to the class.
            maker = auto_class(task) if place is not None else model_class(task, config)
            model, info = maker.from_pretrained(
                place,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                trust_remote_code=False,
                **arguments,
            )
    except Exception as error:
        raise SourceError(
            f"transformers cannot make this model: {first_line(error)}",
            where=where,
            fix="check that config.json and the weights belong to one model",
        ) from error
    _check_shapes(info["mismatched_keys"], where)
    missing = frozenset(info["missing_keys"])
    _check_numbers(model, where)
    if task != FEATURES:
        notes = (*notes, *_unread(info["unexpected_keys"]))
    model.eval()
    if task == FEATURES and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        model, missing = _encoder(model, missing)
        notes = (*notes, "an encoder-decoder model: captured its encoder")
    align(model)
    return Loaded(model, task, missing, notes)


def _check_shapes(mismatched: Any, where: str) -> None:
    """Refuses weights of another shape than the configuration's."""
    if mismatched:
        name, *shapes = sorted(mismatched)[0]
        raise SourceError(
            f"{name} has shape {tuple(shapes[0])} in the file, not {tuple(shapes[1])}",
            where=where,
            fix="config.json and the weights are of different models",
        )


def _check_numbers(model: nn.Module, where: str) -> None:
    """Refuses weights that are no numbers: everything after them would be none either."""
    for name, parameter in model.named_parameters():
        if bool(parameter.isnan().any()):
            raise SourceError(
                f"{name} holds values that are no numbers (NaN)",
                where=where,
                fix="use weights from before the training went wrong, or download them again",
            )


def _unread(unexpected: Collection[str]) -> tuple[str, ...]:
    """A note on weights that the model has no place for."""
    if not unexpected:
        return ()
    shown, more = ", ".join(sorted(unexpected)[:2]), len(unexpected) - 2
    return (f"weights that the model has no place for: {shown}" + f" and {more} more" * (more > 0),)


def align(model: nn.Module) -> None:
    """Moves weights that lie at odd addresses, as tensors mapped from a file do.

    Products take other paths at other alignments and round differently: how a
    file was laid out must not show in the results.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not aligned(tensor):
            tensor.data = tensor.data.clone()


def _encoder(model: Any, missing: frozenset[str]) -> tuple[nn.Module, frozenset[str]]:
    """The encoder, and which of its parameters are missing, by their names within it."""
    encoder = model.get_encoder()
    random = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in missing}
    present = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n not in missing}
    names = {n for n, p in encoder.named_parameters() if id(p) in random - present}
    return encoder, frozenset(names)


def read_config(folder: Path) -> Any:
    """The configuration of a folder.

    Raises:
        SourceError: when config.json is missing, broken, or of an unknown model type.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.exists():
        raise SourceError(f"{folder} has no config.json", fix="copy it from the model's source")
    raw = read_object(file, SourceError, "download it again")
    _check_kind(file, raw)
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise SourceError(f"{file}: {first_line(error)}", fix="correct that entry") from error


def _check_kind(file: Path, raw: dict[str, Any]) -> None:
    """Refuses a configuration of a model that transformers itself does not have."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise SourceError(f"{file} names no model_type", fix='add "model_type", e.g. "bert"')
    if kind not in CONFIG_MAPPING:
        own = (
            "it brings its own Python code, which is never run"
            if "auto_map" in raw
            else (nearest(kind, list(CONFIG_MAPPING)))
        )
        raise SourceError(
            f"{file}: transformers does not know the model_type {kind!r}",
            fix=f"{own}; load it in Python and capture the module",
        )


def choose_task(config: Any, task: str | None) -> tuple[str, tuple[str, ...]]:
    """The task to load for, and notes.

    Raises:
        UsageError: when the named task has no class for this kind of model.
    """
    notes: tuple[str, ...] = ()
    if task is None:
        task, note = default_task(config)
        notes = (note,) if note else ()
    if not supports(task, config):
        raise UsageError(
            f"a {config.model_type} model has no task {task!r}", fix=f"choose --task {FEATURES}"
        )
    return task, notes


def forget_caches(config: Any) -> None:
    """Switches off what a graph of one forward cannot hold, and kernels that are downloads.

    ``attn_implementation`` in a config.json may name a repository whose code
    would be fetched and run: transformers' own choice replaces it.
    """
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        if part is None:
            continue
        for name in list(vars(part)):
            if name == "use_cache" or name.startswith("use_mems"):
                setattr(part, name, False)
        part.return_dict = True
        part.output_attentions = part.output_hidden_states = False
        for kernels in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, kernels, None)):
                setattr(part, kernels, None)


def check_missing(loaded: Loaded, read: frozenset[str], where: str) -> None:
    """Refuses a program that computes with weights nobody trained.

    Args:
        loaded: the model it was captured from.
        read: names of the parameters that the program reads.
        where: the source.

    Raises:
        SourceError: listing them.
    """
    random = sorted(loaded.missing & read)
    if random:
        raise SourceError(
            f"the weights have nothing for {listed(random, 4)}, which {loaded.task} needs",
            where=where,
            fix=f"choose --task {FEATURES}, or a model that was trained for {loaded.task}"
            if loaded.task != FEATURES
            else "the weights belong to another model",
        )
