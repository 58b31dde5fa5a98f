"""GGUF files: header, configuration, weights.

transformers reads GGUF through a Python loop over every string of the
vocabulary, several times, and builds its table of names once per submodule: 13
seconds for a file of 100 MB. Here the header is parsed once, transformers makes
its configuration from a copy of it without the vocabulary, and each tensor is
dequantized straight out of the mapped file. Names and layouts of tensors are
transformers' own tables.
"""

from __future__ import annotations

import math
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ftc.graph.bundle.tensor_file import aligned
from ftc.graph.errors import SourceError

from .gguf_header import VOCABULARY, Header, read_header
from .huggingface import Loaded, build, choose_task
from .quiet import quiet
from .tasks import model_class, supports

_CACHED = 1 << 18  # elements that are dequantized at a time


def load_gguf(path: Path, task: str | None) -> Loaded:
    """Loads the model of a GGUF file in fp32.

    Raises:
        SourceError: when the file is damaged or of a kind that transformers cannot read,
            or when the extra ``ftc[gguf]`` is not installed.
        UsageError: when the model has no such task.
    """
    _need_gguf(path)
    header = read_header(path)
    _check_complete(header)
    config = _config(header)
    if task is None and not getattr(config, "architectures", None):
        config.architectures = _usual_architectures(config)
    task, notes = choose_task(config, task)
    weights = _weights(header, config, task)
    return build(None, config, task, notes, where=str(path), state_dict=weights)


def _need_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SourceError(
            f"reading {path} needs the package gguf", fix="pip install 'ftc[gguf]'"
        ) from None


def _config(header: Header) -> Any:
    """transformers' configuration, from the header without the arrays of the tokenizer.

    The copy that transformers reads ends in a hole as long as the data, since
    its reader maps the tensors too.
    """
    from transformers import AutoConfig

    kept = [
        header.data[start:end]
        for key, (_, start, end) in header.fields.items()
        if not key.startswith("tokenizer.ggml.") or end - start < 4096
    ]
    counts = struct.pack("<IQQ", header.version, len(header.tensors), len(kept))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.gguf"
        with copy.open("wb") as file:
            file.write(b"GGUF" + counts)
            for part in (*kept, header.data[slice(*header.table)]):
                file.write(part.tobytes())
            file.truncate(file.tell() + len(header.data))
        try:
            with quiet():
                config = AutoConfig.from_pretrained(
                    folder, gguf_file=copy.name, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:
            raise _unknown(header, error) from error
    if f"{header.architecture}.vocab_size" not in header.fields and VOCABULARY in header.fields:
        config.vocab_size = header.fields[VOCABULARY][0]
    return config


def _unknown(header: Header, error: Exception) -> SourceError:
    return SourceError(
        f"transformers cannot read GGUF of the architecture {header.architecture!r}: {error}",
        where=str(header.path),
        fix="use the model's folder with config.json and safetensors",
    )


def _usual_architectures(config: Any) -> list[str]:
    """A GGUF file names no task: a causal language model, where there is such a class."""
    task = "causal-lm"
    return [model_class(task, config).__name__] if supports(task, config) else []


def _weights(header: Header, config: Any, task: str) -> dict[str, torch.Tensor]:
    """The tensors of the file in fp32, under transformers' names."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with torch.device("meta"), quiet():
        model = model_class(task, config)(config)
    maker: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    processor = maker(config=config.to_dict())
    try:
        names: dict[str, str] = get_gguf_hf_weights_map(_Names.of(model), processor)
    except NotImplementedError as error:
        raise _unknown(header, error) from error
    weights: dict[str, torch.Tensor] = {}
    for name in header.tensors:
        result = processor.process(
            weights=_dequantized(header, name),
            name=name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": weights},
        )
        if result.name in names:
            tensor = torch.from_numpy(np.ascontiguousarray(result.weights))
            weights[names[result.name]] = tensor if aligned(tensor) else tensor.clone()
    return weights


def _check_complete(header: Header) -> None:
    """Raises SourceError where the file ends before its last tensor does."""
    for name in header.tensors:
        if _extent(header, name)[1] > len(header.data):
            raise SourceError(
                f"{header.path} is truncated: it has {len(header.data):,} bytes, and tensor "
                f"{name} ends at {_extent(header, name)[1]:,}",
                fix="download or copy it again",
            )


def _extent(header: Header, name: str) -> tuple[int, int]:
    """Where the bytes of a tensor start and end."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes, kind, start = header.tensors[name]
    try:
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise SourceError(
            f"{header.path}: tensor {name} is of type {kind}, which this gguf does not know",
            fix="pip install -U gguf, or convert the file to another quantization",
        ) from None
    return start, start + math.prod(sizes) // block * width


def _dequantized(header: Header, name: str) -> np.ndarray[Any, Any]:
    """One tensor in fp32, a few blocks at a time: what each step makes stays in the cache."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    sizes, kind, _ = header.tensors[name]
    quantization = GGMLQuantizationType(kind)
    block, width = GGML_QUANT_SIZES[quantization]
    raw = header.data[slice(*_extent(header, name))].view(np.ndarray)
    result = torch.empty(math.prod(sizes)).numpy()  # numpy's own memory is not aligned
    step = _CACHED // block * block
    for first in range(0, len(result), step):
        blocks = raw[first // block * width : (first + step) // block * width]
        result[first : first + step] = dequantize(blocks[None], quantization)[0]
    return result.reshape(sizes)


@dataclass(frozen=True, slots=True)
class _Names:
    """As much of a model as transformers' table of tensor names looks at.

    The table looks for names in the model and in every module of it; only the
    model without its head can add any, and asking all takes seconds.
    """

    config: Any
    names: dict[str, Any]
    children: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, model: Any) -> _Names:
        base: nn.Module = model.base_model
        children = (
            ()
            if base is model
            else ((model.base_model_prefix, cls(model.config, base.state_dict(), ())),)
        )
        return cls(model.config, model.state_dict(), children)

    def state_dict(self) -> dict[str, Any]:
        return self.names

    def named_children(self) -> tuple[tuple[str, Any], ...]:
        return self.children
