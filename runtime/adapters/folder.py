"""A folder with one JSON file and one safetensors file, written whole or not at all.

Nothing in it is unpickled: of a folder that holds ``adapter_model.bin`` instead, the
error says how to convert it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ftc.graph.bundle.replace_folder import recover, write_folder
from ftc.graph.bundle.tensor_file import aligned, write_tensors
from ftc.graph.errors import BundleError, UsageError


def write(
    place: str | Path,
    head: str,
    tensors_file: str,
    tensors: Mapping[str, Tensor],
    describe: Callable[[str], Mapping[str, Any]],
    *,
    force: bool,
) -> Path:
    """Writes a folder; until it is whole, what stood there stays.

    Args:
        place: the folder.
        head: name of the JSON file.
        tensors_file: name of the safetensors file.
        tensors: its contents.
        describe: content of the JSON file, given the sha256 of the other.
        force: replace a folder that has ``head``.

    Raises:
        UsageError: when something else is there, or ``force`` is missing.
        BundleError: when it cannot be written.
    """
    target = Path(place).expanduser().resolve()
    recover(target)
    ours = (target / head).is_file()
    if target.exists() and not ours and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} exists and holds no adapters", fix="choose another folder")
    if ours and not force:
        raise UsageError(f"{target} exists", fix="choose another folder, or replace it with force")

    def fill(folder: Path) -> None:
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        content = describe(write_tensors(folder / tensors_file, stored))
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (folder / head).write_text(text, encoding="utf-8")

    try:
        write_folder(target, fill)
    except OSError as error:
        raise BundleError(
            f"cannot write {error.filename or target}: {error.strerror or error}",
            where=f"saving {target}; nothing there has changed",
            fix="free some space, or choose another place",
        ) from error
    return target


def read_head(place: str | Path, head: str) -> tuple[Path, dict[str, Any]]:
    """The folder, absolute, and its JSON file.

    Raises:
        BundleError: when it is missing or malformed.
    """
    folder = Path(place).expanduser().resolve()
    recover(folder)
    try:
        found = json.loads((folder / head).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{folder} holds no adapters: it has no {head}", fix="name the folder that has it"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{folder / head} cannot be read: {error}", fix="copy it again") from None
    if not isinstance(found, dict):
        raise BundleError(f"{folder / head} is not a JSON object", fix="copy it again")
    return folder, found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        BundleError: when it is missing or damaged, or a pickle stands in its place.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    pickled = file.with_suffix(".bin")
    if not file.is_file() and pickled.is_file():
        raise BundleError(
            f"{pickled} is a pickle: opening one runs whatever code its author put there",
            fix="load it where you trust it, and save it with "
            "model.save_pretrained(folder, safe_serialization=True)",
        )
    try:
        return {n: t if aligned(t) else t.clone() for n, t in load_file(file).items()}
    except FileNotFoundError:
        raise BundleError(f"{file} is missing", fix="copy the whole folder again") from None
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} is damaged: {error}", fix="copy it again") from None
