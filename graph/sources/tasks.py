"""Tasks: what a captured model computes, and the example inputs that fit it.

A task names a class of transformers' own registry (``AutoModelFor…``); which
one a folder is for is told by the suffix of its ``architectures``. Nothing here
names an architecture: inputs are found in the signature of ``forward``, their
ranges in the configuration and the tables of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ftc.graph.errors import SourceError, UsageError, nearest

FEATURES = "feature-extraction"
_CLASSES = {  # task -> class of transformers
    FEATURES: "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "pretraining": "AutoModelForPreTraining",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
_SUFFIXES = {  # of a name in `architectures` -> task
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "pretraining",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
TASKS = (*_CLASSES, "module")

_BATCH, _SEQUENCE = 2, 13  # 0 and 1 would be fixed by torch.export


@dataclass(frozen=True, slots=True)
class Inputs:
    """What :func:`ftc.graph.capture.capture_module` has to know of a model's inputs.

    Attributes:
        examples: tensors by name.
        dynamic: dynamic axes and their names, by input.
        limits: largest sizes of dynamic dimensions.
        ranges: for integer inputs, one more than the largest legal value.
        masks: names of attention masks.
    """

    examples: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    limits: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, int] = field(default_factory=dict)
    masks: tuple[str, ...] = ()


def check_task(task: str | None) -> None:
    """Refuses an unknown task.

    Raises:
        UsageError: with the nearest known task.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}", fix=nearest(task, TASKS))


def default_task(architectures: Sequence[str] | None) -> tuple[str, str | None]:
    """The task that ``architectures`` of a config.json says, and a note where it says none."""
    for name in architectures or ():
        for suffix, task in _SUFFIXES.items():
            if name.endswith(suffix):
                return task, None
        if not name.endswith("Model"):
            return FEATURES, f"no task fits {name}: captured for {FEATURES}, without its head"
    return FEATURES, None


def auto_class(task: str) -> Any:
    """The class of transformers that loads a model for ``task``.

    Raises:
        UsageError: for ``module``, which takes a module and not a folder.
    """
    import transformers

    if task not in _CLASSES:
        raise UsageError(
            f"task {task!r} is for modules in Python, not for files",
            fix=f"choose one of {', '.join(_CLASSES)}",
        )
    return getattr(transformers, _CLASSES[task])


def model_class(task: str, config: Any) -> Any:
    """The class of transformers that ``config`` is loaded as for ``task``.

    Where it has several, the one that the configuration names, or else the first.
    """
    found = auto_class(task)._model_mapping[type(config)]
    if not isinstance(found, (tuple, list)):
        return found
    named = getattr(config, "architectures", None) or ()
    return next((one for one in found if one.__name__ in named), found[0])


def supports(task: str, config: Any) -> bool:
    """Whether transformers has a class of this kind of model for ``task``."""
    return type(config) in auto_class(task)._model_mapping


def default_inputs(model: nn.Module) -> Inputs:
    """Example inputs of a model of transformers, from its forward and its configuration.

    Raises:
        SourceError: for a model whose main input is neither text nor an image.
    """
    accepted = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main == "pixel_values":
        return _image_inputs(model)
    if "input_ids" in accepted:
        return _text_inputs(model, accepted)
    raise SourceError(
        f"the main input of {type(model).__name__} is {main!r}, for which there is no example",
        fix="load the model in Python and call capture(model, examples={name: tensor, ...})",
    )


def _text_inputs(model: nn.Module, accepted: Mapping[str, Any]) -> Inputs:
    config: Any = model.config
    table = _input_table(model)
    vocabulary = table.num_embeddings if table is not None else int(config.vocab_size)
    limit = _learned_positions(model)
    length = min(_SEQUENCE, limit or _SEQUENCE)
    # Low ids are often special: an example full of padding would hide what the mask does.
    ids = torch.arange(_BATCH * length).view(_BATCH, length) % max(vocabulary - 3, 1) + 2
    examples = {"input_ids": ids.clamp(max=vocabulary - 1)}
    ranges = {"input_ids": vocabulary}
    masks: tuple[str, ...] = ()
    if "attention_mask" in accepted:
        examples["attention_mask"] = torch.ones_like(ids)
        ranges["attention_mask"] = 2
        masks = ("attention_mask",)
    types = getattr(config, "type_vocab_size", 0) or 0
    if "token_type_ids" in accepted and types > 1:
        examples["token_type_ids"] = torch.zeros_like(ids)
        ranges["token_type_ids"] = types
    return Inputs(
        examples=examples,
        dynamic={name: {0: "batch", 1: "sequence"} for name in examples},
        limits={"sequence": limit} if limit else {},
        ranges=ranges,
        masks=masks,
    )


def _image_inputs(model: nn.Module) -> Inputs:
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(_BATCH, int(config.num_channels), height, width, generator=generator)
    return Inputs({"pixel_values": pixels}, {"pixel_values": {0: "batch"}})


def _input_table(model: nn.Module) -> nn.Embedding | None:
    """The table of the input tokens, where the model tells."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def _learned_positions(model: nn.Module) -> int | None:
    """The longest sequence, where positions are rows of a table.

    Such a table has ``max_position_embeddings`` rows, or a few more where the
    model adds an offset; where it has a padding row, positions start after it.
    """
    stated = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 2:
        return None
    words = _input_table(model)
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        if stated <= module.num_embeddings <= stated + 2:
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(stated, module.num_embeddings - skipped)
    return None
