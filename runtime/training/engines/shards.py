"""Tensors that several processes hold in parts: whole, and in part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process that has a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(like: Tensor | None, whole: Tensor) -> Tensor:
    """The part of ``whole`` that stands where ``like`` does; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)  # fmt: skip


def keep(tensors: Iterable[Tensor], device: torch.device | None = None) -> None:
    """Gives tensors memory of their own, so that what they are parts of, or a file, can go."""
    for tensor in tensors:
        own = tensor.detach().to(device or tensor.device)
        tensor.data = own.clone() if own.data_ptr() == tensor.data_ptr() else own


def forget(tensors: Iterable[Tensor], device: torch.device | None = None) -> None:
    """Frees the memory of tensors; their shapes stay."""
    for tensor in tensors:
        tensor.data = tensor.data.new_zeros((), device=device).expand(tensor.shape)


def wholes(
    tensors: Mapping[str, Tensor], *, here: bool,
    gather: Callable[[str, Tensor], Tensor] = lambda _, tensor: whole_of(tensor),
) -> dict[str, Tensor]:  # fmt: skip
    """Whole tensors, gathered one after another; every process that has a part calls it.

    Args:
        tensors: parts, by name.
        here: whether this process is to have them; else each is dropped at once.
        gather: the whole of a part, by its name.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = gather(name, tensor)
        if here:
            found[name] = whole
    return found
