"""PiSSA: an adapter starts as the largest singular values of its weight.

    W = U S V^T,    s B A = U_r S_r V_r^T,    W <- W - s B A

(Meng et al., arXiv 2404.02948), with ``S_r`` shared evenly by ``A`` and ``B``. What
trains is then the part of the weight that matters most, and training goes faster.
A weight that is two factors of rank ``k`` gives ``r`` of its singular values away
and is left with ``k - r``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ftc.graph.errors import PreconditionError
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter

from .factors import set_factors
from .lora_sites import LoraSite

aten = torch.ops.aten


def move_into_adapter(
    rw: Rewriter, site: LoraSite, rank: int, scale: float
) -> tuple[LoraSite, Tensor, Tensor]:
    """Takes ``scale * B A`` out of a weight.

    Returns:
        The site, which is another one where its weight is factored; ``A`` ``[rank, in]``
        and ``B`` ``[out, rank]`` in float64.

    Raises:
        PreconditionError: where the weight is a convolution's, read by others too, or has no
            more than ``rank`` singular values.
    """
    if site.first is not None:
        return _of_factors(rw, site, site.first, rank, scale)
    weight = _float_weight(rw, site, rank)
    left, values, right = _largest(weight.double(), rank)
    a, b = _shared(left, values, right, scale)
    rest = weight.double() - scale * (b.to(weight.dtype).double() @ a.to(weight.dtype).double())
    rw.set_tensor(site.weight, rest.to(weight.dtype))
    return site, a, b


def _of_factors(
    rw: Rewriter, site: LoraSite, first: fx.Node, rank: int, scale: float
) -> tuple[LoraSite, Tensor, Tensor]:
    names = f"{site.weight}.A", f"{site.weight}.B"
    inner, outer = (rw.program.tensor(name).detach() for name in names)
    if rank >= inner.shape[0]:
        raise _refused(
            site,
            f"{site.weight} has rank {inner.shape[0]} itself",
            f"choose rank < {inner.shape[0]}, or init=default",
        )
    (q_in, r_in), (q_out, r_out) = (torch.linalg.qr(t) for t in (inner.double().T, outer.double()))
    u, values, v = torch.linalg.svd(r_out @ r_in.T)
    left, right = q_out @ u, v @ q_in.T
    a, b = _shared(left[:, :rank], values[:rank], right[:rank], scale)
    rest_a, rest_b = _shared(left[:, rank:], values[rank:], right[rank:], 1.0)
    first, node = set_factors(rw, first, site.node, rest_a.to(inner.dtype),
                              rest_b.to(outer.dtype))  # fmt: skip
    return replace(site, node=node, first=first), a, b


def _float_weight(rw: Rewriter, site: LoraSite, rank: int) -> Tensor:
    """The weight, where something can be taken out of it."""
    weight = rw.program.tensor(site.weight)
    if weight.dim() != 2:
        raise _refused(site, f"{site.weight} is a convolution's", "use init=default for it")
    others = [n for n in rw.get_attr(site.weight).users if n.target is not aten.linear.default]
    if others:
        raise _refused(
            site,
            f"{others[0].target} reads {site.weight} too, without the adapter",
            "leave it out of target=, or use init=default",
        )
    if rank > min(weight.shape):
        raise _refused(
            site,
            f"{site.weight} has {min(weight.shape)} singular values",
            f"choose rank <= {min(weight.shape)}, or narrow target=",
        )
    return weight.detach()


def _refused(site: LoraSite, what: str, fix: str) -> PreconditionError:
    return PreconditionError(f"lora{{init=pissa}}: {what}", where=describe(site.node), fix=fix)


def _largest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U_r [out, r]``, ``S_r`` and ``V_r^T [r, in]``, by the smaller Gram matrix."""
    if weight.shape[0] > weight.shape[1]:
        right, values, left = _largest(weight.T, rank)
        return left.T, values, right.T
    _, vectors = torch.linalg.eigh(weight @ weight.T)
    left = vectors[:, -rank:].flip(1)
    scaled = left.T @ weight
    values = torch.linalg.vector_norm(scaled, dim=1)
    safe = torch.where(values > 0, values, torch.ones_like(values))
    return left, values, scaled / safe[:, None]


def _shared(left: Tensor, values: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` with ``scale * B A = left diag(values) right``."""
    root = (values / scale).sqrt()
    return root[:, None] * right, left * root
