"""Gram matrices of the inputs of nodes: what the calibration data says about each product.

For a product ``y = x W^T`` the error of the outputs that a change ``D`` of the
weights makes is a quadratic form in the Gram matrix of its inputs,

    E |x D^T|^2 = tr(D G D^T),    G = E x^T x = X^T X / n    [in, in]

so ``G`` is the Hessian (up to a factor) of error-compensated rounding, and its
Cholesky factor the whitening of a truncated factorisation. Products that read
the same value share one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from .observe import observe
from .program import Program


def grams(
    program: Program, inputs: Iterable[Mapping[str, Tensor]], nodes: Iterable[fx.Node]
) -> dict[fx.Node, Tensor]:
    """``X^T X / n`` of the value of each node, float32 ``[in, in]``.

    Args:
        program: is run once on each of ``inputs`` and not changed.
        inputs: tensors by input name, one mapping a run.
        nodes: of ``program.graph``, each a float ``[..., in]``; ``X`` holds all
            its rows of all runs, ``n`` is their number.

    Returns:
        One matrix a node; none where ``inputs`` is empty.
    """
    sums: dict[fx.Node, Tensor] = {}
    counts: dict[fx.Node, int] = {}

    def watch(node: fx.Node) -> Callable[[Tensor], None]:
        def update(value: Tensor) -> None:
            rows = value.flatten(0, -2).float()
            if node not in sums:
                sums[node], counts[node] = torch.zeros(rows.shape[1], rows.shape[1]), 0
            sums[node].addmm_(rows.T, rows)
            counts[node] += len(rows)

        return update

    observe(program, inputs, {node: watch(node) for node in dict.fromkeys(nodes)})
    return {node: total.div_(max(counts[node], 1)) for node, total in sums.items()}


def cholesky_of_inverse(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular ``U`` with ``U^T U = (G + damping mean(diag G) I)^-1``.

    Args:
        gram: symmetric, positive semidefinite ``[n, n]``.
        damping: above 0; raised tenfold where rounding leaves the sum indefinite.

    Returns:
        float64 ``[n, n]``; the identity for a matrix of zeros.
    """
    matrix = gram.double()
    level = float(matrix.diagonal().mean())
    if level <= 0:
        return torch.eye(len(matrix), dtype=torch.float64)
    unit = torch.eye(len(matrix), dtype=torch.float64) * level
    while True:
        lower, failed = torch.linalg.cholesky_ex(matrix + damping * unit)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                factor: Tensor = upper
                return factor
        damping *= 10
