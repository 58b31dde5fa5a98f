"""Which kernel multiplies by a weight: the fastest that is right on the target.

Rows come from the shapes that the user named: a product's input ``[..., in]``
has as many rows at a shape as its leading dimensions have elements there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from ftc.graph.program import Program
from ftc.graph.symbols import SizesAt
from ftc.graph.target import Choice, Kernel
from ftc.graph.words import plural

from .context import Context


class KernelChoice:
    """Chooses kernels for 8-bit products, and tells what it chose.

    Args:
        program: with fake values.
        ctx: its target and shapes.
        asked: the kernel for every product that has a form for it; None to choose.
        group_size: weights that share a scale in a blocked product.
    """

    def __init__(
        self, program: Program, ctx: Context, asked: Kernel | None, group_size: int
    ) -> None:
        self._target, self._asked, self._group = ctx.target, asked, group_size
        self._sizes = [SizesAt(program, shape) for shape in ctx.shapes]
        self._shapes = [
            ",".join(f"{name}={size}" for name, size in shape.items()) for shape in ctx.shapes
        ]
        self._made: dict[str, Choice] = {}

    def __call__(
        self, name: str, weight: Tensor, readers: Iterable[fx.Node], asked: Kernel | None = None
    ) -> Kernel:
        """The kernel of the weight ``[out, in]``; ``integer`` for one that no product reads.

        Args:
            name: of the weight, for what is told.
            weight: float.
            readers: the nodes that read it.
            asked: the kernel for this one, where it has a form for it.
        """
        asked = asked or self._asked
        inputs = [r.args[0] for r in readers if r.target is torch.ops.aten.linear.default]
        if not inputs:
            return "integer"
        outputs, width = weight.shape
        able = self._able(width)
        if asked is not None:
            fits = asked in able
            choice = Choice(asked, None, "asked for") if fits else Choice(
                "integer", None, f"no whole groups of {self._group}")  # fmt: skip
        else:
            work = [
                (max(at.numel(x) // width, 1), width, outputs) for at in self._sizes for x in inputs
            ]
            choice = self._target.choose(work, able)
        self._made[name] = choice
        return choice.kernel

    def _able(self, width: int) -> tuple[Kernel, ...]:
        """Kernels of 8 bits that a product over ``width`` inputs has a form for."""
        blocked: tuple[Kernel, ...] = () if width % self._group else ("blocked",)
        return ("integer", *blocked, "float")

    @property
    def used(self) -> frozenset[Kernel]:
        """The kernels that products got."""
        return frozenset(choice.kernel for choice in self._made.values())

    def notes(self) -> Iterable[str]:
        """How many products got which kernel and why, a sentence for each kernel."""
        groups: dict[tuple[str, str], list[float]] = {}
        for choice in self._made.values():
            speeds = groups.setdefault((choice.kernel, choice.reason), [])
            if choice.speed is not None:
                speeds.append(choice.speed)
        counts = Counter((choice.kernel, choice.reason) for choice in self._made.values())
        for (kernel, reason), number in counts.most_common():
            text = f"{plural(number, 'product')} got kernel {kernel}: {reason}"
            yield text + self._told(kernel, groups[kernel, reason])

    def _told(self, kernel: str, speeds: Sequence[float]) -> str:
        table = self._target.table
        if not speeds or table is None:
            return f" (target {self._target.name})"
        low, high = f"{min(speeds):.1f}", f"{max(speeds):.1f}"
        speed = low if low == high else f"{low} to {high}"
        against = "" if kernel == "float" else f", {speed} times as fast as float"
        shapes = " and ".join(self._shapes)
        return f" on {self._target.name} at {shapes}{against} ({table.origin})"
