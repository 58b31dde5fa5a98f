"""Which weight files may be read, and which are sound.

A pickle runs code of its author's choosing when it is opened, so nothing that
unpickles objects is ever called on a user's file: weights come from safetensors,
or from a torch file that ``weights_only=True`` accepts (tensors and plain
containers, nothing else).
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ftc.graph.errors import SourceError

PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})

CONVERT = """convert it once, in a place where you trust the file:
    import torch
    from safetensors.torch import save_file
    weights = torch.load({name!r}, weights_only={only})
    save_file({{k: v.contiguous().clone() for k, v in weights.items()}}, "model.safetensors")"""


def refuse_pickle(path: Path, forbidden: str | None = None) -> SourceError:
    """The error for a file that could run code when it is opened.

    Args:
        path: the file.
        forbidden: the object in it that is no tensor, where one was found.
    """
    found = f" that holds {forbidden}" if forbidden else ""
    return SourceError(
        f"{path} is a pickle{found}: opening one runs whatever code its author put there",
        fix=CONVERT.format(name=str(path), only=forbidden is None)
        + "\n  and put model.safetensors beside the model's config.json",
    )


def weight_files(folder: Path) -> tuple[str, list[Path]]:
    """The weight files of a model folder.

    Returns:
        ``"safetensors"`` or ``"torch"``, and the files, all checked.

    Raises:
        SourceError: when there are none, one is missing or damaged, or only
            pickles with objects in them exist.
    """
    for kind, single in (("safetensors", "model.safetensors"), ("torch", "pytorch_model.bin")):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            files = [folder / single]
        elif index.is_file():
            files = _shards(index)
        else:
            continue
        for file in files:
            check_safetensors(file) if kind == "safetensors" else check_torch(file)
        return kind, files
    raise _no_weights(folder)


def _no_weights(folder: Path) -> SourceError:
    others = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if others:
        return refuse_pickle(others[0])
    stray = sorted(p.name for p in folder.glob("*.safetensors"))
    if stray:
        return SourceError(
            f"{folder} has config.json and {', '.join(stray)}, but no model.safetensors",
            fix="rename the weights to model.safetensors, or add model.safetensors.index.json",
        )
    return SourceError(
        f"{folder} has a config.json but no weights",
        fix="put model.safetensors (or its shards and model.safetensors.index.json) there",
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{index} is broken: {error}", fix="download it again") from None
    folder = index.parent
    for name in names:
        if not isinstance(name, str):
            raise SourceError(f"{index} names {name!r} as a file", fix="download it again")
        if Path(name).name != name:
            raise SourceError(
                f"{index} names a file outside its folder: {name!r}", fix="download it again"
            )
        if not (folder / name).is_file():
            raise SourceError(
                f"{folder / name} is missing, but {index.name} names it", fix="download it again"
            )
    return [folder / name for name in names]


def check_safetensors(path: Path) -> None:
    """Reads the header and compares it with the file's length.

    Raises:
        SourceError: naming the file, when it is truncated or no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise _damaged(path, f"it has only {size} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _damaged(
                path, f"its header says {length:,} bytes, of which {size - 8:,} are there"
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(path, f"its header is no safetensors header ({error})") from None
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise _damaged(path, f"its tensors need {expected:,} bytes, but it has {size:,}")


def _damaged(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is truncated or damaged: {why}", fix="download or copy it again")


def check_torch(path: Path) -> None:
    """Opens a torch file without running anything.

    Raises:
        SourceError: naming the object in it that is no tensor, or saying that it is damaged.
    """
    load_torch(path)


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a torch file by name, mapped into memory where the format allows it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd protocols: what can be read is checked below
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise refuse_pickle(path, _forbidden(str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None
    if not isinstance(weights, dict) or not all(
        isinstance(v, torch.Tensor) for v in weights.values()
    ):
        raise SourceError(
            f"{path} holds no dictionary of tensors",
            fix="save model.state_dict(), best as model.safetensors",
        )
    return weights


def _is_zip(path: Path) -> bool:
    """Whether it is of the format since torch 1.6, the only one that can be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _forbidden(report: str) -> str:
    """The name of the object that torch refused, out of its report."""
    found = re.search(r"GLOBAL ([\w.]+)", report) or re.search(r"(?:global|class) ([\w.]+)", report)
    return found[1] if found else report.strip().splitlines()[0]
