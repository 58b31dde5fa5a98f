"""How far two programs are apart.

:func:`compare` measures outputs: the relative error ``|a - b| / |a|`` in the
Frobenius norm, the largest elementwise difference, and the cosine of each row
(last axis). Sums are taken in float64 over chunks of rows, so logits of a large
vocabulary cost a few megabytes. Rows of an output that belong to padded
positions are left out, since attention leaves noise there: an output whose
leading dimensions are those of an input with role ``"mask"`` (``[batch,
sequence]``) is compared where that mask is not 0. Equal infinities and equal
NaNs agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .program import Drift, Program
from .signature import Signature

Inputs = Mapping[str, Tensor]
_CHUNK = 1 << 16  # elements in float64 at a time: half a megabyte

# Relative error that reordering sums may cost, by dtype: float32 keeps seven
# digits, and a network of thirty layers loses one or two of them.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(slots=True)
class Difference:
    """Sums over pairs of tensors, from which a :class:`Drift` is made.

    Attributes:
        error, norm: sums of squares of ``a - b`` and of ``a``.
        max_abs, peak: largest ``|a - b|`` and largest ``|a|``.
        cosines, rows: sum of the rows' cosines, and how many.
        cosine_min: the smallest.
        rounding: the largest relative error that counts as rounding.
    """

    error: float = 0.0
    norm: float = 0.0
    max_abs: float = 0.0
    peak: float = 0.0
    cosines: float = 0.0
    rows: int = 0
    cosine_min: float = 1.0
    rounding: float = 0.0

    @property
    def relative(self) -> float:
        """``|a - b| / |a|``; infinite where ``a`` is 0 and ``b`` is not."""
        if self.error == 0:
            return 0.0
        return float((self.error / self.norm) ** 0.5) if self.norm else float("inf")

    @property
    def is_rounding(self) -> bool:
        """Whether both the whole and every element agree to rounding.

        The largest elementwise difference may be ten times the relative bound,
        measured against the largest magnitude: one wrong element among millions
        does not hide in the norm.
        """
        # `not >` and not `<=`: a NaN must fail
        return self.relative <= self.rounding and self.max_abs <= 10 * self.rounding * self.peak

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds one pair of equal shape."""
        self.rounding = max(self.rounding, ROUNDING.get(a.dtype, 0.0))
        width = a.shape[-1] if a.dim() else 1
        rows_a, rows_b = a.detach().reshape(-1, width), b.detach().reshape(-1, width)
        step = max(1, _CHUNK // max(1, width))
        for start in range(0, len(rows_a), step):
            self._add_rows(
                rows_a[start : start + step].double(), rows_b[start : start + step].double()
            )

    def _add_rows(self, a: Tensor, b: Tensor) -> None:
        if not a.numel():
            return
        gap = a - b
        if not torch.isfinite(gap.sum()):
            a, b, gap = _without_odd(a, b)
        of_a = torch.linalg.vecdot(a, a)
        norms = (of_a * torch.linalg.vecdot(b, b)).sqrt()
        errors = torch.linalg.vecdot(gap, gap)
        same = (errors == 0).double()  # the cosine of two rows of zeros
        cosines = torch.where(norms > 0, torch.linalg.vecdot(a, b) / norms, same)
        self.error += float(errors.sum())
        self.norm += float(of_a.sum())
        self.max_abs = max(self.max_abs, _largest(gap))
        self.peak = max(self.peak, _largest(a))
        self.cosines += float(cosines.sum())
        self.rows += len(a)
        self.cosine_min = min(self.cosine_min, float(cosines.min()))


def _largest(values: Tensor) -> float:
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _without_odd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with infinities and NaNs as 0, and their gap: 0 where those agree, else infinite."""
    odd = ~(a.isfinite() & b.isfinite())
    alike = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(alike, 0.0, torch.where(odd, torch.inf, a - b))
    return a.masked_fill(odd, 0.0), b.masked_fill(odd, 0.0), gap


def compare(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], inputs: Inputs, signature: Signature
) -> dict[str, Difference]:
    """Differences by the name of the output; an output that only one side has is left out."""
    found: dict[str, Difference] = {}
    for spec in signature.outputs:
        if spec.name not in before or spec.name not in after:
            continue
        a, b = before[spec.name], after[spec.name]
        found[spec.name] = difference = Difference()
        if a.shape != b.shape:
            difference.error = difference.max_abs = float("inf")
            continue
        valid = valid_rows(spec.shape, inputs, signature)
        difference.add(a if valid is None else a[valid], b if valid is None else b[valid])
    return found


def summarize(differences: Sequence[Difference], inputs: str) -> Drift:
    """The worst relative and absolute difference, and the cosine over all rows."""
    rows = sum(d.rows for d in differences)
    return Drift(
        relative=max((d.relative for d in differences), default=0.0),
        max_abs=max((d.max_abs for d in differences), default=0.0),
        cosine_mean=sum(d.cosines for d in differences) / rows if rows else 1.0,
        cosine_min=min((d.cosine_min for d in differences), default=1.0),
        inputs=inputs,
    )


def measure_drift(
    before: Program, after: Program, inputs: Inputs | Sequence[Inputs], source: str = "given inputs"
) -> Drift:
    """Runs both programs on the same inputs and compares the outputs of the same names.

    Args:
        before: the program that is right.
        after: the other.
        inputs: one set of inputs or several.
        source: what the inputs are, in words.
    """
    sets = [inputs] if isinstance(inputs, Mapping) else inputs
    differences: list[Difference] = []
    for each in sets:
        with torch.no_grad():
            found = compare(before(each), after(each), each, before.signature)
        differences += found.values()
    return summarize(differences, source)


def valid_rows(shape: tuple[Any, ...], inputs: Inputs, signature: Signature) -> Tensor | None:
    """Where an output's leading dimensions are not padding; None where no mask says."""
    for spec in signature.inputs:
        if spec.role == "mask" and len(spec.shape) == 2 and shape[:2] == spec.shape:
            return inputs[spec.name] != 0
    return None
