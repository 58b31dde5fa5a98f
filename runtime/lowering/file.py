"""Writing a model to disk: whole or not at all, and without a second copy of its weights.

A protobuf message may hold its fields in any order. The file is the model's
fields, then one graph field whose length is known beforehand, and in it the
graph without weights, then one weight after the other, written from the memory
they are in. Beyond 1.8 GB, where protobuf's limit of 2 GB is near, weights go to
a second file ``NAME.data``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx_ir as ir

EXTERNAL_BEYOND = 1_800_000_000


def save_onnx(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Writes ``model`` to ``path`` under a temporary name and renames it.

    A reader sees the old file or the new one, never a part.

    Raises:
        OSError: when the disk is full or the folder is missing; the old file stays.
    """
    target = Path(path)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        data = f"{target.name}.data" if size > EXTERNAL_BEYOND else None
        ir.save(model, draft, external_data=data)
        if data is not None:
            os.replace(draft.with_name(data), target.with_name(data))
        os.replace(draft, target)
