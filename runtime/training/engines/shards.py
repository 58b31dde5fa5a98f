"""Tensors that several processes hold in parts: whole, in part, and their norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
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


def forget(tensors: Iterable[Tensor]) -> None:
    """Frees the memory of tensors; their shapes stay."""
    for tensor in tensors:
        tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)


def restore(full: Mapping[str, Tensor], sharded: Mapping[str, Tensor]) -> None:
    """Gives parameters their whole tensors back."""
    for name, tensor in full.items():
        tensor.data = whole_of(sharded[name].detach()).clone()


def scale_to(
    counted: Sequence[Tensor], scaled: Sequence[Tensor], most: float,
    groups: Sequence[dist.ProcessGroup],
) -> float:  # fmt: skip
    """Scales gradients so that their norm is at most ``most``; returns the norm.

    Args:
        counted: each part of each gradient in one process of the groups only.
        scaled: all that this process has.
        most: largest norm.
        groups: over which norms are added.
    """
    squares = torch.zeros((), dtype=torch.float64)
    for gradient in counted:
        squares += gradient.detach().double().square().sum().cpu()
    device = scaled[0].device if scaled else squares.device
    squares = squares.to(device)
    for group in groups:
        dist.all_reduce(squares, group=group)
    norm = float(squares.sqrt())
    if norm > most:
        torch._foreach_mul_(list(scaled), most / (norm + 1e-6))
    return norm
