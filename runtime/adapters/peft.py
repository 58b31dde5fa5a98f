"""PEFT's folders: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Low-rank adapters, prefixes and soft prompts, both ways. What PEFT has and ftc has not
is refused by its name; a pickle in the place of the safetensors file is never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ftc.graph.adapters import adapter_kind, adapter_parameters
from ftc.graph.errors import BundleError, PreconditionError, UsageError
from ftc.graph.peft_layout import (
    prefix_from_peft,
    prefix_names,
    prefix_to_peft,
    prompt_name,
)
from ftc.graph.program import Program
from ftc.graph.structure import find_structure
from ftc.passes.pipeline import Pipeline
from ftc.passes.prefix import Prefix
from ftc.passes.prompt import Prompt

from . import peft_lora
from .files import put
from .folder import read_head, read_tensors, write
from .peft_whole import head_to_peft, whole_from_peft, whole_to_peft

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_EMBEDDINGS = "prompt_embeddings"
_PREFIX = "base_model."
_MOVING = frozenset({"smooth", "rotate", "awq"})  # outputs stay, channels inside do not
_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
}


_ANY_TASK = "FEATURE_EXTRACTION"
"""Of other models: without a task PEFT would load a prefix or a prompt and not use it."""


def save_peft(
    program: Program, folder: str | Path, *, base: str | None = None, force: bool = False
) -> Path:
    """Writes the adapters of ``program`` so that PEFT loads them on the model it came from.

    Args:
        program: with adapters of one kind.
        folder: must not exist, or hold PEFT's adapters and ``force`` be given.
        base: folder or name of that model, for the configuration.
        force: replace adapters that are there.

    Raises:
        UsageError: for a program without adapters, or with some that PEFT has no place for.
        PreconditionError: for a program whose channels ``smooth``, ``rotate`` or ``awq`` moved.
    """
    kinds = {adapter_kind(name) for name in adapter_parameters(program)}
    if len(kinds) != 1:
        found = " and ".join(sorted(map(str, kinds))) or "no adapters"
        raise UsageError(f"a folder of PEFT holds one kind, and the program has {found}",
                         fix="save them in ftc's own format: save_adapters")  # fmt: skip
    (kind,) = kinds
    config, tensors = _TO[str(kind)](program)
    if moved := _moved(program, str(config["peft_type"]), tensors):
        raise PreconditionError(
            f"{moved} changed the channels that these adapters read, and PEFT's model has the old",
            fix="save the adapters before these passes run, or in ftc's own format: save_adapters",
        )
    shared = {
        "task_type": _TASKS.get(program.signature.task, None if kind == "lora" else _ANY_TASK),
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    return write(folder, CONFIG, TENSORS, tensors, lambda _: {**shared, **config}, force=force)


def load_peft(program: Program, folder: str | Path) -> Program:
    """``program`` with the adapters of a folder that PEFT wrote.

    Args:
        program: the model that they were trained on, in floats, or quantized without ``smooth``,
            ``rotate`` and ``awq``; not changed.
        folder: with ``adapter_config.json``.

    Raises:
        BundleError: for a folder that is damaged, or holds a pickle.
        UsageError: for a kind of adapter that ftc has not.
        PreconditionError: when they do not fit the program, or ``smooth``, ``rotate`` or ``awq``
            moved the channels that they read.
    """
    place, config = read_head(folder, CONFIG)
    kind = str(config.get("peft_type"))
    if kind not in _FROM:
        raise UsageError(f"ftc has no adapters of the type {kind}", where=str(place / CONFIG),
                         fix=f"it has {', '.join(sorted(_FROM))}")  # fmt: skip
    tensors = read_tensors(place / TENSORS)
    if moved := _moved(program, kind, tensors):
        passes = ",".join(record.spec for record in program.history)
        raise PreconditionError(
            f"{moved} changed the channels that these adapters were trained on",
            where=str(place),
            fix="load the adapters on the model as captured, and quantize then: "
            f'program = load_peft(capture(MODEL), "{folder}"); '
            f"Pipeline.parse({passes!r}).run(program)",
        )
    try:
        return _FROM[kind](program, config, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{place} is malformed: {error!r}", fix="save it again") from None


def _moved(program: Program, kind: str, tensors: Mapping[str, Tensor]) -> str:
    """The passes of ``program`` that scaled or rotated what these tensors meet, in words.

    Embeddings are as they were: a soft prompt alone meets nothing that moved.
    """
    if kind == "PROMPT_TUNING" and tensors.keys() == {_EMBEDDINGS}:
        return ""
    done = dict.fromkeys(r.name for r in program.history if r.modified and r.name in _MOVING)
    return " and ".join(done)


def _prefix_to(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    flat = prefix_to_peft(program)
    names = prefix_names(program)
    heads, tokens, dim = program.tensor(names[0]).shape
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": tokens,
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        "num_layers": len(names) // 2,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }, {_EMBEDDINGS: flat} | _beside(program)


def _prompt_to(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    embeddings = program.tensor(prompt_name(program)).detach()
    cores = find_structure(program).cores
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": embeddings.shape[0],
        "token_dim": embeddings.shape[1],
        "num_attention_heads": max((core.heads for core in cores), default=0),
        "num_layers": len(cores),
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }, {_EMBEDDINGS: embeddings} | _beside(program)


def _prefix_from(
    program: Program, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Program:
    flat = tensors[_EMBEDDINGS]
    program = Pipeline((Prefix(tokens=flat.shape[0]),)).run(program).program
    return put(program, prefix_from_peft(program, flat) | _whole(program, tensors))


def _prompt_from(
    program: Program, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Program:
    embeddings = tensors[_EMBEDDINGS]
    program = Pipeline((Prompt(tokens=embeddings.shape[0]),)).run(program).program
    return put(program, {prompt_name(program): embeddings} | _whole(program, tensors))


def _beside(program: Program) -> dict[str, Tensor]:
    """What is kept whole beside a prefix or a prompt, by PEFT's names."""
    whole = head_to_peft(program) | whole_to_peft(program)
    return {_PREFIX + name: tensor for name, tensor in whole.items()}


def _whole(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, back from PEFT's names, as far as it differs from the program's."""
    return whole_from_peft(program, {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items() if name.startswith(_PREFIX)
    })  # fmt: skip


_TO = {"lora": peft_lora.to_peft, "prefix": _prefix_to, "prompt": _prompt_to}
_FROM = {
    "LORA": peft_lora.from_peft,
    "PREFIX_TUNING": _prefix_from,
    "PROMPT_TUNING": _prompt_from,
}
