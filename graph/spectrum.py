"""The best factors of a weight of any rank, in the metric of its product's inputs and outputs.

With ``F = L L^T`` weighing errors at the output and ``G = R R^T`` at the input, the
change ``D`` of a weight costs ``tr(F D G D^T) = |L^T D R|^2``, so the best weight of
rank ``r`` is the truncated SVD of ``M = L^T W R``. Its left singular vectors ``P``
(or its right ones, where ``M`` is narrower than high) are eigenvectors of the smaller
of ``M M^T`` and ``M^T M``, and

    W_r = (L^-T P_r) (P_r^T L^T W)        or        (W R P_r) (P_r^T R^-1)

So where ``W`` is not higher than wide, ``G`` is needed only as ``W G W^T [out, out]``.

``F`` and ``G`` the identity: plain SVD. ``F`` the identity: SVD-LLM (Wang et al.,
arXiv 2403.07378). Both: losses of different weights are in one unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

Metric = Tensor | None


@dataclass(frozen=True)
class Spectrum:
    """A weight's singular values in a metric, and what its factors are made of.

    Attributes:
        weight: ``[out, in]``.
        squares: squared singular values, descending, float64 ``[min(out, in)]``.
        basis: singular vectors of the smaller side, float32 ``[min, min]``, or None
            where only the values were asked for.
        root: Cholesky factor of that side's metric, or its diagonal, or None: the identity.
    """

    weight: Tensor
    squares: Tensor
    basis: Tensor | None
    root: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def tails(self) -> Tensor:
        """Loss of each rank from 0 to full, float64 ``[min + 1]``."""
        sums = self.squares.flip(0).cumsum(0).flip(0)
        return torch.cat([sums, sums.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A [rank, in]`` and ``B [out, rank]`` in its dtype, a row as large as its column."""
        assert self.basis is not None
        part, weight = self.basis[:, :rank].double(), self.weight.double()
        out, width = self.shape
        own, back = _times(self.root, part), _undone(self.root, part)
        a, b = (own.T @ weight, back) if out <= width else (back.T, weight @ own)
        scale = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-300)).sqrt()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        dtype = self.weight.dtype
        return (a * scale[:, None]).to(dtype).contiguous(), (b / scale).to(dtype).contiguous()


def spectrum(
    weight: Tensor, left: Metric = None, right: Metric = None, *,
    outputs: Tensor | None = None, values_only: bool = False,
) -> Spectrum:  # fmt: skip
    """The spectrum of ``weight [out, in]``.

    Args:
        weight: any float dtype; computed in float64.
        left: lower Cholesky factor ``L [out, out]`` of the outputs' metric, or the diagonal
            of a diagonal one ``[out]``; None: identity.
        right: ``R [in, in]`` of the inputs', or ``[in]``.
        outputs: ``W G W^T [out, out]`` in place of ``right``, where ``out <= in``.
        values_only: without singular vectors, several times as fast.
    """
    out, width = weight.shape
    assert outputs is None or (right is None and out <= width)
    high = out <= width
    if outputs is not None:
        gram = _seen_from(left, outputs)
    else:
        matrix = weight.double()
        if right is not None:
            matrix = matrix * right if right.dim() == 1 else matrix @ right
        if left is not None:
            matrix = left[:, None] * matrix if left.dim() == 1 else left.T @ matrix
        gram = matrix @ matrix.T if high else matrix.T @ matrix
    if values_only:
        squares = torch.linalg.eigvalsh(gram)
        return Spectrum(weight, squares.flip(0).clamp_min(0), None, None)
    squares, basis = torch.linalg.eigh(gram)
    return Spectrum(
        weight, squares.flip(0).clamp_min(0), basis.flip(1).float(), left if high else right
    )


def _seen_from(left: Metric, outputs: Tensor) -> Tensor:
    """``L^T C L``."""
    if left is None:
        return outputs
    if left.dim() == 1:
        return left[:, None] * outputs * left
    return left.T @ outputs @ left


def _times(root: Metric, part: Tensor) -> Tensor:
    """``R P``."""
    if root is None:
        return part
    return root[:, None] * part if root.dim() == 1 else root @ part


def _undone(root: Metric, part: Tensor) -> Tensor:
    """``R^-T P``."""
    if root is None:
        return part
    if root.dim() == 1:
        return part / root[:, None]
    solved: Tensor = solve_triangular(root.T, part, upper=True)
    return solved


def damped_root(moment: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of ``C + damping mean(diag C) I``, float64 ``[n, n]`` or ``[n]``.

    Damping pulls the metric towards that of plain SVD, which treats all directions
    alike: what the data did not show counts for something. Raised tenfold where
    rounding leaves the sum indefinite.

    Args:
        moment: symmetric, positive semidefinite ``[n, n]``, or its diagonal ``[n]``.
        damping: above 0.
    """
    matrix = moment.double()
    if matrix.dim() == 1:
        root = (matrix + damping * matrix.mean()).sqrt()
        return root if bool(matrix.any()) else torch.ones_like(matrix)
    level = float(matrix.diagonal().mean())
    if not level > 0:
        return torch.eye(len(matrix), dtype=torch.float64)
    unit = torch.eye(len(matrix), dtype=torch.float64) * level
    while True:
        lower, failed = torch.linalg.cholesky_ex(matrix + damping * unit)
        if not failed:
            found: Tensor = lower
            return found
        damping *= 10


def damped_outputs(moment: Tensor, level: float, weight: Tensor, damping: float) -> Tensor:
    """``W (G + damping level I) W^T``, float64 ``[out, out]``: outputs of inputs so damped.

    Args:
        moment: ``W G W^T [out, out]``.
        level: mean of the diagonal of ``G``; where it is 0, ``G`` is taken for the identity.
        weight: ``W [out, in]``.
        damping: above 0.
    """
    wide = weight.double()
    plain = wide @ wide.T
    return moment.double() + damping * level * plain if level > 0 else plain
