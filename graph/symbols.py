"""Symbolic sizes in a reader's terms: their names, and their values at given sizes.

A dynamic dimension of a fake value is an expression in the exporter's symbols
(``s43*s53``). The placeholders say which symbol is which dimension of the
signature; two symbols may stand for one dimension. From that an expression is
printed as ``batch*sequence`` and evaluated, without guarding on anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from . import shapes
from .program import Program


def expression(size: Any) -> sympy.Expr | int:
    """The sympy expression of a size, or the size itself when it is a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def symbol_names(program: Program) -> dict[sympy.Expr, str]:
    """``{symbol or expression of an input's dimension: the dimension's name}``."""
    names: dict[sympy.Expr, str] = {}
    placeholders = (n for n in program.graph.nodes if n.op == "placeholder")
    for node, spec in zip(placeholders, program.signature.inputs, strict=False):
        if isinstance(fake := node.meta.get(shapes.VAL), Tensor):
            for size, dim in zip(fake.shape, spec.shape, strict=False):
                if isinstance(dim, str) and isinstance(size, torch.SymInt):
                    names.setdefault(size.node.expr, dim)
    return names


class DimensionNames:
    """Prints sizes with the signature's dimension names in place of symbols."""

    def __init__(self, program: Program) -> None:
        self._known = {e: sympy.Symbol(n) for e, n in symbol_names(program).items()}
        self._texts: dict[sympy.Expr, str] = {}

    def size(self, size: Any) -> str:
        """``384``, ``batch``, ``batch*sequence``; an unknown symbol keeps its own name."""
        form = expression(size)
        if isinstance(form, int):
            return str(form)
        if (text := self._texts.get(form)) is None:
            text = self._texts[form] = str(form.xreplace(self._known))
        return text

    def shape(self, sizes: Any) -> str:
        """``[batch, sequence, 384]``"""
        return f"[{', '.join(map(self.size, sizes))}]"


class SizesAt:
    """Evaluates sizes when each dynamic dimension has a given size.

    Args:
        program: with fake values.
        sizes: a size for every dynamic dimension (:meth:`Signature.sizes`).

    Attributes:
        assumed: symbols that no input determines (the count of a data-dependent
            selection); they are taken as 1.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.assumed: set[str] = set()
        self._cache: dict[sympy.Expr, int] = {}
        self._known: dict[sympy.Expr, sympy.Expr] = {}
        for form, name in symbol_names(program).items():
            self._known.update(_solve(form, sizes[name]))

    def size(self, size: Any) -> int:
        """The number that ``size`` is."""
        form = expression(size)
        if isinstance(form, int):
            return form
        if (number := self._cache.get(form)) is None:
            value = form.xreplace(self._known)
            if unknown := value.free_symbols:
                self.assumed |= {str(s) for s in unknown}
                value = value.xreplace(dict.fromkeys(unknown, sympy.Integer(1)))
            number = self._cache[form] = int(value)
        return number

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of a node's value, or of a fake value; ``()`` for a number."""
        if isinstance(value, fx.Node):
            value = value.meta.get(shapes.VAL)
        return tuple(map(self.size, value.shape)) if isinstance(value, Tensor) else ()

    def numel(self, value: Any) -> int:
        """Elements of a node's value, summed over the tensors of a tuple; 0 for a number."""
        if isinstance(value, fx.Node):
            value = value.meta.get(shapes.VAL)
        if isinstance(value, (tuple, list)):
            return sum(map(self.numel, value))
        if not isinstance(value, Tensor):
            return 0
        count = 1
        for size in value.shape:
            count *= self.size(size)
        return count

    def nbytes(self, value: Any) -> int:
        """Bytes of a node's value, summed over the tensors of a tuple; 0 for a number."""
        if isinstance(value, fx.Node):
            value = value.meta.get(shapes.VAL)
        if isinstance(value, (tuple, list)):
            return sum(map(self.nbytes, value))
        return self.numel(value) * value.element_size() if isinstance(value, Tensor) else 0


def _solve(form: sympy.Expr, size: int) -> dict[sympy.Expr, sympy.Expr]:
    """What ``form == size`` says about the symbol in ``form`` (``2*s0 == 8`` gives ``s0 = 4``)."""
    if form.is_Symbol:
        return {form: sympy.Integer(size)}
    symbols = list(form.free_symbols)
    roots = sympy.solve(form - size, symbols[0]) if len(symbols) == 1 else []
    return {symbols[0]: sympy.Integer(int(roots[0]))} if len(roots) == 1 else {}
