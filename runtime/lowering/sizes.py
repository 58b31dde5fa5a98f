"""Symbolic sizes: one name for each, and the ONNX values that compute them.

The exporter's symbols say which sizes are equal; the signature says more, since
one name is one size everywhere: ``s18`` of ``input_ids`` and ``s43`` of
``attention_mask`` are both ``batch``. Sizes are compared in those names
(:meth:`Sizes.canonical`), and a size that has to be computed is computed from
its expression, not from the nodes that traced it: ``2*sequence - 1`` is one
``Shape`` and two operations wherever and however often it occurs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from onnx_ir import Value
from torch import Tensor

from ftc.graph.symbols import expression, symbol_names

from .table import Unsupported

if TYPE_CHECKING:
    from ftc.graph.program import Program

    from .emitter import Emitter

Size = int | sympy.Expr
Dims = tuple[Size, ...]

_VARIADIC = {"Add": "Add", "Mul": "Mul", "Max": "Max", "Min": "Min"}


class Sizes:
    """Names, compares and emits sizes for one emitter.

    Args:
        emitter: emits the arithmetic.
        program: with fake values; its signature names the symbols.
    """

    def __init__(self, emitter: Emitter, program: Program) -> None:
        self._emitter = emitter
        self._canonical: dict[sympy.Expr, Size] = {}
        self._values: dict[Size, Value] = {}
        self._sources: dict[sympy.Expr, tuple[Value, int]] = {}
        self._named: dict[sympy.Expr, sympy.Expr] = {}
        for form, name in symbol_names(program).items():
            self._named.update(_solve(form, sympy.Symbol(name, integer=True, positive=True)))

    def canonical(self, size: Any) -> Size:
        """A size (int, SymInt or expression) as an int or in the signature's names."""
        form = size if isinstance(size, sympy.Expr) else expression(size)
        if isinstance(form, int):
            return form
        if (known := self._canonical.get(form)) is None:
            renamed = form.xreplace(self._named)
            known = int(renamed) if renamed.is_Integer else renamed
            self._canonical[form] = known
        return known

    def dims(self, fake: Tensor) -> Dims:
        """The canonical shape of a fake tensor."""
        return tuple(map(self.canonical, fake.shape))

    def register(self, value: Value, dims: Dims) -> None:
        """Notes that ``value`` has shape ``dims``: a symbol not seen before is read off it."""
        for axis, size in enumerate(dims):
            if isinstance(size, sympy.Symbol):
                self._sources.setdefault(size, (value, axis))

    def register_scalar(self, value: Value, size: Any) -> None:
        """Notes that the data-dependent size ``size`` is the one-element int64 ``value``."""
        self._values[self.canonical(size)] = value

    def value(self, size: Any) -> Value:
        """``size`` as an int64 value of shape ``[1]``.

        Raises:
            Unsupported: for an expression that has no integer form in ONNX.
        """
        form = self.canonical(size)
        if (known := self._values.get(form)) is None:
            known = self._values[form] = self._emit(form)
        return known

    def shape_value(self, sizes: Any) -> Value:
        """A list of sizes as one int64 value of shape ``[len(sizes)]``."""
        e = self._emitter
        forms = [self.canonical(s) for s in sizes]
        if all(isinstance(f, int) for f in forms):
            return e.const(forms, torch.int64)
        parts: list[Value] = []
        run: list[int] = []
        for form in forms:
            if isinstance(form, int):
                run.append(form)
                continue
            if run:
                parts.append(e.const(run, torch.int64))
                run = []
            parts.append(self.value(form))
        if run:
            parts.append(e.const(run, torch.int64))
        return parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=0)

    def _emit(self, form: Size) -> Value:
        e = self._emitter
        if isinstance(form, int):
            return e.const([form], torch.int64)
        if isinstance(form, sympy.Symbol):
            if form not in self._sources:
                raise Unsupported(f"the size {form} is known from no tensor")
            tensor, axis = self._sources[form]
            return e.op("Shape", tensor, start=axis, end=axis + 1, dtype=torch.int64)
        kind = type(form).__name__
        top, bottom = form.as_numer_denom()
        if bottom != 1:
            return e.op("Div", self.value(top), self.value(bottom))
        if kind in _VARIADIC:
            return self._chain(_VARIADIC[kind], form.args)
        if kind in ("Pow", "PowByNatural") and form.args[1].is_Integer and form.args[1] > 0:
            return self._chain("Mul", [form.args[0]] * int(form.args[1]))
        if kind == "Identity":
            return self.value(form.args[0])
        if kind in ("FloorDiv", "CleanDiv", "Mod", "PythonMod", "CeilDiv"):
            return self._divide(kind, *form.args)
        raise Unsupported(f"the size {form} has no integer form in ONNX")

    def _divide(self, kind: str, top: Any, bottom: Any) -> Value:
        """Python's ``//`` and ``%``; ONNX's ``Div`` rounds to zero, its ``Mod`` is Python's."""
        e = self._emitter
        if kind == "CeilDiv":
            top = top + bottom - 1
        a, b = self.value(top), self.value(bottom)
        if "Mod" in kind:
            return e.op("Mod", a, b)
        if not (top.is_nonnegative and bottom.is_positive):
            a = e.op("Sub", a, e.op("Mod", a, b))
        return e.op("Div", a, b)

    def _chain(self, op: str, terms: Any) -> Value:
        result = self.value(terms[0])
        for term in terms[1:]:
            result = self._emitter.op(op, result, self.value(term))
        return result


def _solve(form: sympy.Expr, name: sympy.Symbol) -> dict[sympy.Expr, sympy.Expr]:
    """What ``form == name`` says of the symbol: ``8*s0 == batch`` gives ``{s0: batch/8}``."""
    if form.is_Symbol:
        return {form: name}
    symbols = list(form.free_symbols)
    roots = sympy.solve(form - name, symbols[0]) if len(symbols) == 1 else []
    return {symbols[0]: roots[0]} if len(roots) == 1 else {}


def free_form(before: Dims, after: Dims) -> list[Any]:
    """``after`` with 0 for a size kept in place and -1 for the one that is hardest to compute."""
    form: list[Any] = [
        0 if not isinstance(d, int) and i < len(before) and before[i] == d else d
        for i, d in enumerate(after)
    ]
    unknown = [i for i, d in enumerate(form) if not isinstance(d, int)]
    if unknown:
        hardest = max(unknown, key=lambda i: (form[i].count_ops(), i))
        form[hardest] = -1
    return form
