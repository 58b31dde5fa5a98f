"""The order of a pipeline, checked before anything runs.

A pass states facts about programs: what it ``needs`` before it, what it
``provides`` from then on, what it ``forbids`` before it. :func:`arrange` walks a
pipeline with the facts that hold at each point. A missing fact that exactly one
known pass provides is provided by adding that pass in front, with a note; an
order that cannot work is refused with one that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations

from ftc.graph.errors import OrderError, UsageError

from .base import Pass
from .registry import providers

Planned = tuple[Pass, str | None]
_TRIED = 5  # passes whose orders are tried for a suggestion: 120 at most


class _Conflict(Exception):
    """Why a plan cannot work, and what to do where that is not another order."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def arrange(passes: Sequence[Pass], facts: frozenset[str]) -> tuple[Planned, ...]:
    """The passes that will run, each with the reason it was added, or None.

    Args:
        passes: in the order asked for.
        facts: what holds of the program already.

    Raises:
        OrderError: when a pass forbids what holds before it, or needs what
            nothing provides; with an order that would do, if there is one.
    """
    try:
        return _plan(passes, facts)
    except _Conflict as conflict:
        raise OrderError(
            conflict.what,
            where=order_text(passes),
            fix=conflict.fix or _suggestion(passes, facts),
        ) from None


def order_text(passes: Iterable[Pass]) -> str:
    """The text form of a pipeline."""
    return ",".join(each.spec for each in passes)


def _plan(passes: Sequence[Pass], facts: frozenset[str]) -> tuple[Planned, ...]:
    planned: list[Planned] = []
    for position, each in enumerate(passes):
        facts = _place(each, None, facts, planned, passes[position + 1 :], ())
    return tuple(planned)


def _place(
    each: Pass, reason: str | None, facts: frozenset[str], planned: list[Planned],
    later: Sequence[Pass], needing: tuple[Pass, ...],
) -> frozenset[str]:  # fmt: skip
    """Appends a pass, after those it needs, to ``planned``; the facts that hold then.

    Args:
        needing: the pass that was asked for and those added for it, down to this one.
    """
    name = each.name if each.forbids == type(each).forbids else each.spec  # for an option of it
    who = f"{name}, which is added for {needing[0].name}," if needing else name
    if hindering := sorted(each.forbids & facts):
        earlier = [p.name for p, _ in planned if p.provides & each.forbids]
        because = f"after {' and '.join(earlier)}" if earlier else "here"
        raise _Conflict(
            f"{who} cannot run {because}: the program is {' and '.join(hindering)}",
            None if earlier else _instead(each, facts),
        )
    for fact in sorted(each.needed - facts):
        if fact in facts:
            continue  # an added pass provided it
        if provider := next((p for p in later if fact in p.provides), None):
            raise _Conflict(f"{who} needs {_noun(fact)}, and {provider.name} makes it so later")
        added = _provider(each, who, fact)
        why = f"added: {each.name} needs {_noun(fact)}"
        facts = _place(added, why, facts, planned, later, (*needing, each))
    planned.append((each, reason))
    return facts | each.provides


def _instead(each: Pass, facts: frozenset[str]) -> str:
    """What to do where the program itself hinders a pass."""
    freer = each.freer()
    if freer is not None and not freer.forbids & facts:
        return f"use {freer.spec}"
    return "start from the program as it was before that"


def _noun(fact: str) -> str:
    return f"a program that is {fact}"


def _provider(each: Pass, who: str, fact: str) -> Pass:
    """The pass to add for a missing fact."""
    known = providers(fact)
    if len(known) != 1:
        names = ", ".join(cls.name for cls in known) or "no known pass"
        raise _Conflict(
            f"{who} needs {_noun(fact)}; provided by: {names}",
            f"put one of them before {each.name}" if known else f"leave {each.name} out",
        )
    try:
        return known[0]()
    except (TypeError, UsageError):
        raise _Conflict(
            f"{who} needs {_noun(fact)}, and {known[0].name} has options to be chosen",
            f"put {known[0].name}{{...}} before {each.name}",
        ) from None


def _suggestion(passes: Sequence[Pass], facts: frozenset[str]) -> str:
    """An order of the same passes that works, nearest to the one asked for, or of freer ones."""
    if len(passes) <= _TRIED:
        freer = [each.freer() or each for each in passes]
        for kind in [passes] if freer == list(passes) else [passes, freer]:
            for order in permutations(kind):
                if _works(order, facts):
                    return f"use {order_text(order)}"
    return "no order of these passes works: leave one out"


def _works(passes: Sequence[Pass], facts: frozenset[str]) -> bool:
    try:
        _plan(passes, facts)
    except _Conflict:
        return False
    return True
