"""A short selector for a set of products: ``attention`` rather than a hundred names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.select import select
from ftc.graph.structure import find_structure
from ftc.passes.lora_sites import LoraSite

_ROLES = ("attention", "ffn", "head", "conv")


def selector(program: Program, sites: Sequence[LoraSite], chosen: Sequence[LoraSite]) -> str:
    """A selector that means the products ``chosen`` and no other of ``sites``.

    Roles if they do, else the ends of names, else all the names.
    """
    structure = find_structure(program)
    wanted = {site.weight for site in chosen}
    for text in _texts(chosen):
        try:
            names = select(text, program, structure)
        except UsageError:  # no such role here
            continue
        if {site.weight for site in sites if site.names & names} == wanted:
            return text
    raise AssertionError("the names themselves are a selector")


def _texts(chosen: Sequence[LoraSite]) -> Iterator[str]:
    yield "product"
    for count in (1, 2, 3):
        for roles in itertools.combinations(_ROLES, count):
            yield " | ".join(roles)
    yield "product - head"
    names = sorted({min(site.names) for site in chosen})
    for parts in (2, 3):
        ends = sorted({".".join(name.rsplit(".", parts)[1:]) for name in names})
        yield " | ".join(f'"*.{end}"' for end in ends)
    yield " | ".join(f'"{name}"' for name in names)
