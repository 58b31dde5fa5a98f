"""A small pattern language over graph nodes; a failed match is a value with a reason.

A pattern is an expression that mirrors the code it finds::

    x = capture("x")
    mean = op("aten.mean", op("aten.pow", x, const(2)))
    rms = commutative("aten.mul", x, op("aten.rsqrt", op("aten.add", mean, capture("eps"))))

    found = match(rms, node)
    if not found:
        print(found.reason)  # "add_4 calls aten.add where aten.rsqrt was expected"
    else:
        found["x"], found["eps"], found.nodes

Matching backtracks over alternatives and both orders of a commutative operator. Of
all ways that failed, the one that got furthest is the :class:`Miss`, an idea of
onnxscript's. A name captured twice must be the same value both times.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.provenance import describe


@dataclass(frozen=True, slots=True)
class Match:
    """A success: what was captured, and the nodes that matched an operator, outermost first."""

    captures: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What ``name`` captured; ``default`` when its alternative was not taken."""
        return self.captures.get(name, default)

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Miss:
    """A failure: the reason, as a sentence, and the node it is about. False as a condition."""

    reason: str
    node: fx.Node | None = None

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason + (f"\n  {describe(self.node)}" if self.node is not None else "")


@dataclass(slots=True)
class _Trace:
    """The miss that came furthest: after the most matched operators."""

    depth: int = -1
    miss: Miss = field(default_factory=lambda: Miss("nothing was tried"))

    def fail(self, state: Match, value: Any, reason: str) -> None:
        if len(state.nodes) > self.depth:
            self.depth = len(state.nodes)
            self.miss = Miss(reason, value if isinstance(value, fx.Node) else None)


class Pattern(ABC):
    """What a value may look like. ``a | b`` tries ``a``, then ``b``."""

    @abstractmethod
    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        """Every way to match ``value`` that extends ``state``."""

    def __or__(self, other: Pattern) -> Pattern:
        return _Either((self, other))


def match(pattern: Pattern, value: Any) -> Match | Miss:
    """Matches ``pattern`` against a node (or a constant), the first way that works."""
    trace = _Trace()
    for found in pattern.solve(value, Match({}, ()), trace):
        return found
    return trace.miss


def find(pattern: Pattern, nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, Match]]:
    """Each node that matches, with its match, in the order given."""
    for node in nodes:
        if found := match(pattern, node):
            assert isinstance(found, Match)
            yield node, found


@dataclass(frozen=True, slots=True)
class _Any(Pattern):
    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        yield state


@dataclass(frozen=True, slots=True)
class _Capture(Pattern):
    name: str
    inner: Pattern

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        for found in self.inner.solve(value, state, trace):
            if self.name not in found.captures:
                yield Match({**found.captures, self.name: value}, found.nodes)
            elif _same(found.captures[self.name], value):
                yield found
            else:
                other = _text(found.captures[self.name])
                trace.fail(
                    found, value, f"{self.name} is {_text(value)} here and {other} elsewhere"
                )


@dataclass(frozen=True, slots=True)
class _Const(Pattern):
    values: tuple[Any, ...]

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        if isinstance(value, fx.Node):
            trace.fail(state, value, f"{value.name} is computed where a constant was expected")
        elif self.values and not any(_same(value, v) for v in self.values):
            wanted = " or ".join(map(repr, self.values))
            trace.fail(state, value, f"the constant is {value!r}, not {wanted}")
        else:
            yield state


@dataclass(frozen=True, slots=True)
class _Tensor(Pattern):
    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            yield state
        else:
            trace.fail(state, value, f"{_text(value)} is not read from a parameter or buffer")


@dataclass(frozen=True, slots=True)
class _Op(Pattern):
    targets: tuple[str, ...]
    args: tuple[Pattern, ...]
    options: tuple[tuple[str, Pattern], ...]
    swap: bool = False

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        if not self._calls(value):
            called = f"{value.name} calls {_called(value)}" if isinstance(value, fx.Node) else value
            trace.fail(state, value, f"{called} where {' or '.join(self.targets)} was expected")
            return
        if len(value.args) < len(self.args):
            trace.fail(state, value, f"{value.name} has only {len(value.args)} arguments")
            return
        entered = Match(state.captures, (*state.nodes, value))
        pairs = [*zip(self.args, value.args, strict=False)]
        pairs += [(pattern, argument(value, name)) for name, pattern in self.options]
        yield from _solve_all(pairs, entered, trace)
        if self.swap:
            (a, left), (b, right), *rest = pairs
            yield from _solve_all([(a, right), (b, left), *rest], entered, trace)

    def _calls(self, value: Any) -> bool:
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return False
        return operator_name(value) in self.targets or str(value.target) in self.targets


@dataclass(frozen=True, slots=True)
class _Listed(Pattern):
    items: tuple[Pattern, ...]

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        if not isinstance(value, (list, tuple)) or len(value) != len(self.items):
            return trace.fail(state, value, f"{_text(value)} is no list of {len(self.items)}")
        yield from _solve_all([*zip(self.items, value, strict=True)], state, trace)


@dataclass(frozen=True, slots=True)
class _Either(Pattern):
    choices: tuple[Pattern, ...]

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        for choice in self.choices:
            yield from choice.solve(value, state, trace)


@dataclass(frozen=True, slots=True)
class _Skipping(Pattern):
    targets: tuple[str, ...]
    inner: Pattern

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        skip = _Op(self.targets, (), ())
        while True:
            yield from self.inner.solve(value, state, trace)
            if not skip._calls(value):
                return
            state = Match(state.captures, (*state.nodes, value))
            value = value.args[0]


@dataclass(frozen=True, slots=True)
class _Sole(Pattern):
    inner: Pattern

    def solve(self, value: Any, state: Match, trace: _Trace) -> Iterator[Match]:
        if isinstance(value, fx.Node) and len(value.users) != 1:
            trace.fail(state, value, f"{value.name} has {len(value.users)} readers, not one")
        else:
            yield from self.inner.solve(value, state, trace)


any_: Pattern = _Any()
"""Matches everything."""


def capture(name: str, inner: Pattern = any_) -> Pattern:
    """Remembers the value as ``name``."""
    return _Capture(name, inner)


def const(*values: Any) -> Pattern:
    """A literal argument: any, or one of ``values``; numbers compare by value."""
    return _Const(values)


def tensor(name: str | None = None) -> Pattern:
    """A parameter or buffer read straight from the module, remembered as ``name``."""
    return capture(name, _Tensor()) if name else _Tensor()


def op(targets: str | tuple[str, ...], *args: Pattern, **options: Pattern) -> Pattern:
    """A call of one of ``targets``.

    Args:
        targets: ``"aten.add"`` (any overload) or ``"aten.add.Tensor"`` (that one).
        args: patterns of the leading arguments; further arguments may be anything.
        options: patterns of arguments by their name in the schema, given or default.
    """
    return _Op(_names(targets), args, tuple(options.items()))


def commutative(targets: str | tuple[str, ...], a: Pattern, b: Pattern) -> Pattern:
    """A call of one of ``targets`` with the arguments in either order."""
    return _Op(_names(targets), (a, b), (), swap=True)


def skipping(targets: str | tuple[str, ...], inner: Pattern) -> Pattern:
    """``inner`` under any number (or none) of calls of ``targets``, through first arguments."""
    return _Skipping(_names(targets), inner)


def listed(*items: Pattern) -> Pattern:
    """A list argument with these elements."""
    return _Listed(items)


def sole(inner: Pattern) -> Pattern:
    """``inner``, read by one node only, so that a rewrite may take it away."""
    return _Sole(inner)


def _solve_all(pairs: list[Any], state: Match, trace: _Trace) -> Iterator[Match]:
    if not pairs:
        yield state
        return
    (pattern, value), *rest = pairs
    for found in pattern.solve(value, state, trace):
        yield from _solve_all(rest, found, trace)


def _names(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return bool(a == b) and (isinstance(a, bool) == isinstance(b, bool))


def _called(node: fx.Node) -> str:
    return operator_name(node) if node.op == "call_function" else f"nothing ({node.op})"


def _text(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)
