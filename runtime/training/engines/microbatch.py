"""Microbatches of one shape: what a pipeline's messages need.

Stages exchange tensors of a shape that both sides know beforehand. So the
batches of a step are padded to the largest of them: rows by repeating the last
one, other dynamic dimensions with zeros, which the attention mask excludes. The
loss sees outputs cut back to the batch as it was, so padding counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ftc.graph.errors import PreconditionError
from ftc.graph.signature import Dim, Signature
from ftc.runtime.training.objectives.base import Batch

Sizes = Mapping[str, int]


def sizes_of(batch: Batch, signature: Signature) -> dict[str, int]:
    """The size of each named dimension of a batch."""
    return {
        name: size
        for spec in signature.inputs if spec.name in batch.inputs
        for name, size in zip(spec.shape, batch.inputs[spec.name].shape, strict=True)
        if isinstance(name, str)
    }  # fmt: skip


def largest(every: Sequence[Sizes]) -> dict[str, int]:
    """The largest size of each dimension."""
    return {name: max(sizes[name] for sizes in every) for name in every[0]}


def padded(batch: Batch, signature: Signature, wanted: Sizes) -> tuple[Tensor, ...]:
    """The program's inputs in order, padded to the sizes ``wanted``.

    Raises:
        PreconditionError: where padding would change the result.
    """
    own = sizes_of(batch, signature)
    rows = signature.inputs[0].shape[0]
    longer = [name for name in own if own[name] != wanted[name] and name != rows]
    masks = {d for s in signature.inputs if s.role == "mask" for d in s.shape}
    if any(name not in masks for name in longer):
        raise PreconditionError(
            f"batches of a step differ in {longer[0]}, and no mask of the program hides padding",
            fix="give rows of one size",
        )
    return tuple(
        _pad(tensor, spec.shape, wanted, rows)
        for spec, tensor in zip(signature.inputs, signature.bind(batch.inputs), strict=True)
    )


def cut_back(output: Tensor, shape: Sequence[Dim] | None, batch: Batch,
             signature: Signature, wanted: Sizes) -> Tensor:  # fmt: skip
    """An output of padded inputs as that of the batch itself.

    Args:
        output: of the padded inputs.
        shape: of the output, by names; None where it is not known: ``[rows, length, …]``.
        batch: as it was.
        signature: of the program.
        wanted: the padded sizes.
    """
    own = sizes_of(batch, signature)
    if own == wanted:
        return output
    names = shape or signature.inputs[0].shape
    for dim, name in enumerate(names):
        if isinstance(name, str) and own.get(name, -1) != wanted.get(name, -1):
            output = output.narrow(dim, 0, own[name])
    return output


def _pad(tensor: Tensor, shape: Sequence[Dim], wanted: Sizes, rows: Dim) -> Tensor:
    for dim, name in enumerate(shape):
        more = wanted[name] - tensor.shape[dim] if isinstance(name, str) else 0
        if more:
            filler = (tensor.narrow(dim, tensor.shape[dim] - 1, 1) if name == rows
                      else tensor.new_zeros(()))  # fmt: skip
            extra = list(tensor.shape)
            extra[dim] = more
            tensor = torch.cat([tensor, filler.expand(extra)], dim)
    return tensor
