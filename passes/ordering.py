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
_TRIED = 6  # passes whose orders are tried for a suggestion: 720 at most


def arrange(passes: Sequence[Pass], facts: frozenset[str]) -> tuple[Planned, ...]:
    """The passes that will run, each with the reason it was added, or None.

    Args:
        passes: in the order asked for.
        facts: what holds of the program already.

    Raises:
        OrderError: when a pass forbids what holds before it, or needs what
            nothing provides; with an order that would do, if there is one.
    """
    planned: list[Planned] = []
    for position, each in enumerate(passes):
        _check_forbidden(passes, position, facts)
        for fact in sorted(each.needed - facts):
            if fact in facts:
                continue  # an added pass provided it
            added = _provider(passes, position, fact)
            for extra, reason in arrange((added,), facts):
                planned.append((extra, reason or f"added: {each.name} needs {_noun(fact)}"))
                facts |= extra.provides
        planned.append((each, None))
        facts |= each.provides
    return tuple(planned)


def order_text(passes: Iterable[Pass]) -> str:
    """The text form of a pipeline."""
    return ",".join(each.spec for each in passes)


def _noun(fact: str) -> str:
    return f"a program that is {fact}"


def _check_forbidden(passes: Sequence[Pass], position: int, facts: frozenset[str]) -> None:
    each = passes[position]
    hindering = sorted(each.forbids & facts)
    if not hindering:
        return
    earlier = [p.name for p in passes[:position] if p.provides & each.forbids]
    because = f"after {' and '.join(earlier)}" if earlier else "here"
    fix = _suggestion(passes) if earlier else "start from the program as it was before that"
    raise OrderError(
        f"{each.name} cannot run {because}: the program is {' and '.join(hindering)}",
        where=order_text(passes),
        fix=fix,
    )


def _provider(passes: Sequence[Pass], position: int, fact: str) -> Pass:
    """The pass to add for a missing fact."""
    each = passes[position]
    if later := [p for p in passes[position + 1 :] if fact in p.provides]:
        raise OrderError(
            f"{each.name} needs {_noun(fact)}, which {later[0].name} makes it later",
            where=order_text(passes),
            fix=_suggestion(passes),
        )
    known = providers(fact)
    if len(known) != 1:
        names = ", ".join(cls.name for cls in known) or "no known pass"
        raise OrderError(
            f"{each.name} needs {_noun(fact)}; provided by: {names}",
            where=order_text(passes),
            fix=f"put one of them before {each.name}" if known else None,
        )
    try:
        return known[0]()
    except (TypeError, UsageError):
        raise OrderError(
            f"{each.name} needs {_noun(fact)}, and {known[0].name} has options to be chosen",
            where=order_text(passes),
            fix=f"put {known[0].name}{{...}} before {each.name}",
        ) from None


def _suggestion(passes: Sequence[Pass]) -> str:
    """An order of the same passes that works, nearest to the one asked for."""
    if len(passes) <= _TRIED:
        for order in permutations(passes):
            if _works(order):
                return f"use {order_text(order)}"
    return "no order of these passes works: leave one out"


def _works(passes: Sequence[Pass]) -> bool:
    """Whether an order breaks no rule when what nothing here provides is taken as given."""
    provided = frozenset(fact for p in passes for fact in p.provides)
    facts: frozenset[str] = frozenset()
    for each in passes:
        if each.forbids & facts or (each.needed & provided) - facts:
            return False
        facts |= each.provides
    return True
