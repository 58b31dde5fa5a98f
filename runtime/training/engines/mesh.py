"""The mesh: how many processes share the data, the weights, the layers and the products.

``dp=2,fsdp=2,pp=2`` is eight processes. Each axis is one engine of torch.distributed:

========  ===========================================================
``dp``    the same weights, other rows: their gradients are summed
``fsdp``  other rows, and each process keeps a share of every weight
``pp``    each process has some stages of the graph
``tp``    each process has some heads and some columns of a layer
========  ===========================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ftc.graph.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class Mesh:
    """Processes along each axis.

    Attributes:
        pp, dp, fsdp, tp: 1 where an axis is not used. Ranks count along ``tp`` first,
            so that the processes that talk most are neighbours.
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """The mesh that ``text`` says, ``"dp=2,pp=2"``.

        Raises:
            UsageError: for an unknown axis, or a size that is no number above 0.
        """
        known = [field.name for field in fields(cls)]
        sizes: dict[str, int] = {}
        for part in filter(None, map(str.strip, text.split(","))):
            axis, _, size = (each.strip() for each in part.partition("="))
            if axis not in known:
                raise UsageError(f"the mesh has no axis {axis!r}", fix=nearest(axis, known))
            if not size.isdecimal() or int(size) < 1 or axis in sizes:
                raise UsageError(f"{part!r} is no size of the axis {axis}", fix=f"{axis}=2, once")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost axis first."""
        return self.pp, self.dp, self.fsdp, self.tp

    @property
    def size(self) -> int:
        """Processes."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        named = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]
        return ",".join(each for each in named if not each.endswith("=1")) or "dp=1"
