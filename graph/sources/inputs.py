"""Example inputs of a model of transformers, from its forward, its configuration and its files.

Nothing here names an architecture: what a model takes is read off the signature
of its ``forward``, how large it may be off its tables and its configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftc.graph.errors import CaptureError, SourceError
from ftc.graph.json_file import read_object

from .tasks import SEQ2SEQ

_BATCH, _SEQUENCE = 2, 13  # 0 and 1 would be fixed by torch.export
_IMAGE = 224
_PREPROCESSOR = "preprocessor_config.json"
DECODER_IDS = "decoder_input_ids"
_KINDS = ("pixel_values", "input_values", "input_features", DECODER_IDS)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What :func:`ftc.graph.capture.capture_module` has to know of a model's inputs.

    Attributes:
        examples: tensors by name.
        dynamic: dynamic axes and their names, by input.
        limits: largest sizes of dynamic dimensions.
        ranges: for integer inputs, one more than the largest legal value.
        masks: names of attention masks.
        notes: what had to be decided.
    """

    examples: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    limits: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, int] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def default_inputs(model: nn.Module, task: str, folder: Path | None = None) -> Inputs:
    """Example inputs of a model of transformers.

    Args:
        model: its ``forward`` and ``config`` say what it takes.
        task: what it was loaded for.
        folder: where its preprocessor_config.json may be, which says the size of images.

    Raises:
        SourceError: for a model whose main input is neither text nor an image.
    """
    accepted = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main == "pixel_values":
        return _image_inputs(model, folder)
    if "input_ids" in accepted:
        inputs = _text_inputs(model, accepted)
        return _with_decoder(inputs) if task == SEQ2SEQ else inputs
    raise SourceError(
        f"the main input of {type(model).__name__} is {main!r}, for which there is no example",
        fix=f"capture it in Python on examples: capture(folder, examples={{{main!r}: tensor}})",
    )


def missing_inputs(model: nn.Module, inputs: Inputs, error: CaptureError) -> CaptureError:
    """``error``, with the inputs that ``model`` may have missed: it takes more than one kind."""
    accepted = inspect.signature(model.forward).parameters
    untried = [n for n in accepted if n.endswith(_KINDS) and n not in inputs.examples]
    if not untried or not inputs.examples:
        return error
    given = ", ".join(inputs.examples)
    return CaptureError(
        error.what,
        where=error.where,
        fix=f"it was tried on {given} alone, and also takes {', '.join(untried)}: if it needs "
        "them, call capture(folder, examples={name: tensor, ...}) in Python",
    )


def _text_inputs(model: nn.Module, accepted: Mapping[str, Any]) -> Inputs:
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    table = _input_table(model)
    vocabulary = table.num_embeddings if table is not None else int(config.vocab_size)
    limit = _learned_positions(model, config)
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


def _with_decoder(inputs: Inputs) -> Inputs:
    """The inputs of an encoder, and the tokens that its decoder goes on from."""
    ids = inputs.examples["input_ids"]
    start = ids[:, : max(2, ids.shape[1] - 4)]  # shorter: the two lengths are two dimensions
    return replace(
        inputs,
        examples={**inputs.examples, DECODER_IDS: start.clone()},
        dynamic={**inputs.dynamic, DECODER_IDS: {0: "batch", 1: "decoder_sequence"}},
        limits={**inputs.limits, **{f"decoder_{d}": n for d, n in inputs.limits.items()}},
        ranges={**inputs.ranges, DECODER_IDS: inputs.ranges["input_ids"]},
    )


def _image_inputs(model: nn.Module, folder: Path | None) -> Inputs:
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or config
    (height, width), notes = _image_size(vision, folder)
    channels = int(getattr(vision, "num_channels", 3))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(_BATCH, channels, height, width, generator=generator)
    return Inputs({"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, notes=notes)


def _image_size(config: Any, folder: Path | None) -> tuple[tuple[int, int], tuple[str, ...]]:
    """``(height, width)`` and a note: the model's own size, that of its preprocessing, or 224."""
    if (size := _pair(getattr(config, "image_size", None))) is not None:
        return size, ()
    file = folder / _PREPROCESSOR if folder is not None else None
    if file is not None and file.is_file():
        raw = read_object(file, SourceError, "download it again")
        keys = ("crop_size", "size") if raw.get("do_center_crop", True) else ("size",)
        found = (_pair(raw.get(key)) for key in keys)
        if (size := next((pair for pair in found if pair), None)) is not None:
            return size, (f"images of {size[0]} x {size[1]}, as {_PREPROCESSOR} says",)
    why = f"neither config.json nor {_PREPROCESSOR} says their size"
    return (_IMAGE, _IMAGE), (f"images of {_IMAGE} x {_IMAGE}: {why}",)


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width out of the forms that transformers writes them in."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        height, width = size
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    return None


def _input_table(model: nn.Module) -> nn.Embedding | None:
    """The table of the input tokens, where the model tells."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def _learned_positions(model: nn.Module, config: Any) -> int | None:
    """The longest sequence, where positions are rows of a table.

    Such a table has ``max_position_embeddings`` rows, or a few more where the
    model adds an offset; where it has a padding row, positions start after it.
    """
    stated = getattr(config, "max_position_embeddings", None)
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
