"""The head of a bundle, ``ftc.json``: of which format it is, and whether its files are whole.

Imports no torch, which what runs a bundle's file in onnxruntime does without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ftc.graph.errors import BundleError
from ftc.graph.json_file import read_object

from .output import HEAD, is_bundle

FORMAT = 1
GRAPH, WEIGHTS = "graph.json", "model.safetensors"


def read_head(folder: Path) -> dict[str, Any]:
    """What ``ftc.json`` says.

    Raises:
        BundleError: where there is none, or one of no format or a later one.
    """
    if not is_bundle(folder):
        raise BundleError(
            f"{folder} is no bundle: it has no {HEAD}",
            fix="name the folder that `ftc compile` wrote",
        )
    head = read_json(folder / HEAD)
    _check_format(head, folder)
    return head


def _check_format(head: dict[str, Any], folder: Path) -> None:
    number = head.get("format")
    if not isinstance(number, int) or number < 1:
        raise BundleError(f"{folder / HEAD} names no format", fix="make the bundle again")
    if number > FORMAT:
        raise BundleError(
            f"{folder} is of format {number}, written by ftc {head.get('ftc')}; this is ftc"
            f" {own_version()}, which reads up to format {FORMAT}",
            fix=f"pip install 'ftc>={head.get('ftc')}'",
        )


def check_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], only: Collection[str] | None = None
) -> None:
    """Compares every file that a head lists with its size and its hash.

    Args:
        only: the files that are going to be read; of others the size is compared alone.

    Raises:
        BundleError: naming the first that differs, or is not there.
    """
    for name in (GRAPH, WEIGHTS):
        if name not in files:
            raise BundleError(f"{folder / HEAD} does not list {name}")
    for name, expected in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{folder / HEAD} lists a file outside the bundle: {name!r}")
        if not file.is_file():
            raise BundleError(f"{file} is missing", fix="copy the whole folder again")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise BundleError(
                f"{file} has {size:,} bytes, not {expected['bytes']:,}",
                fix="copy it again; if you changed it, make the bundle again",
            )
        if (only is None or name in only) and hash_file(file) != expected["sha256"]:
            raise BundleError(
                f"{file} does not have the hash that {HEAD} says",
                fix="copy it again; if you changed it, make the bundle again",
            )


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        BundleError: where it does not.
    """
    return read_object(path, BundleError, "make the bundle again", "cannot be read")


def hash_file(path: Path) -> str:
    """The sha256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_version() -> str:
    """This ftc's."""
    try:
        return version("ftc")
    except PackageNotFoundError:
        return "0"
