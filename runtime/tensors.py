"""Tensors in files, for programs that do not take text: ``.npz`` and ``.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ftc.graph.cache_inputs import Names
from ftc.graph.errors import UsageError, nearest
from ftc.graph.signature import Signature

KINDS = (".npz", ".safetensors")


def read_tensors(path: Path, signature: Signature | None = None) -> dict[str, Tensor]:
    """Tensors of a file by name, nothing unpickled.

    Args:
        path: ``.npz`` or ``.safetensors``.
        signature: check names, dtypes and ranks against it, converting integers and
            floats of another width.

    Raises:
        UsageError: naming the file, for a wrong kind, a damaged one, or tensors that do not fit.
    """
    if path.suffix not in KINDS:
        raise UsageError(f"{path} is no file of tensors", fix=f"use {' or '.join(KINDS)}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}", fix="name a file with the inputs by name")
    try:
        tensors = _load(path)
    except Exception as error:  # each format has errors of its own, some with bad advice
        raise UsageError(
            f"{path} is no {path.suffix} file, or a damaged one ({type(error).__name__})",
            fix="write it with numpy.savez(FILE, name=array, ...)"
            if path.suffix == ".npz"
            else "write it with safetensors.torch.save_file",
        ) from error
    return tensors if signature is None else _fit(tensors, signature, path)


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _fit(tensors: dict[str, Tensor], signature: Signature, path: Path) -> dict[str, Tensor]:
    for name in tensors:
        if name not in signature.input_names:
            raise UsageError(
                f"{path}: unknown input {name!r}", fix=nearest(name, signature.input_names)
            )
    for spec in signature.inputs:
        given = tensors.get(spec.name)
        if given is not None and given.is_floating_point() == spec.dtype.is_floating_point:
            tensors[spec.name] = given.to(spec.dtype)
    try:
        signature.bind(tensors)
        _check_sizes(tensors, signature)
    except UsageError as error:
        raise UsageError(error.what, where=str(path), fix=error.fix) from None
    return tensors


def _check_sizes(tensors: Mapping[str, Tensor], signature: Signature) -> None:
    """One size for each dimension, none of them 0, and integers that the program knows."""
    found: dict[str, tuple[int, str]] = {}
    for spec in signature.inputs:
        given = tensors[spec.name]
        behind_nothing = Names.PAST in spec.shape and given.shape[spec.shape.index(Names.PAST)] == 0
        if given.numel() == 0 and not behind_nothing:
            raise UsageError(
                f"input {spec.name!r} is empty, of shape {tuple(given.shape)}",
                fix="give at least one row",
            )
        for dim, size in zip(spec.shape, given.shape, strict=True):
            if isinstance(dim, int):
                continue
            known, where = found.setdefault(dim, (size, spec.name))
            if known != size:
                raise UsageError(
                    f"{dim} is {known} in {where!r} and {size} in {spec.name!r}",
                    fix=f"give both the same {dim}",
                )
    if (wrong := out_of_range(tensors, signature)) is not None:
        raise UsageError(wrong[0], fix=wrong[1])


def out_of_range(inputs: Mapping[str, Tensor], signature: Signature) -> tuple[str, str] | None:
    """The first input with an integer that the program does not know: what, and the fix."""
    for spec in signature.inputs:
        given = inputs.get(spec.name)
        if given is None or given.is_floating_point() or given.dtype == torch.bool:
            continue
        wrong = given[(given < spec.low) | (given >= spec.high)]
        if len(wrong):
            return f"{spec.name} holds {int(wrong[0])}", f"use {spec.low} to {spec.high - 1}"
    return None
