"""Selectors: a small language for sets of weights.

    select("ffn | attention", program)
    select("product - head", program)
    select("encoder.layer.[0-3].* & norm", program)
    select("layer[0:4] & (ffn | bias)", program)

======================  =====================================================
atom                    the weights
======================  =====================================================
``all``                 every weight
``ffn`` ``attention``   by role (:data:`ftc.graph.structure.ROLES`); likewise
                        ``embedding norm head bias conv product adapter``
``layer[2]``            of the third repeated block; ``layer[0:4]``, ``layer[-2:]``
a glob                  by name: ``*`` anything, ``?`` one character, ``[0-3]``
                        one of; any of a tied weight's names
``"a glob"``            the same, where the name holds spaces or operators, or
                        is also an atom's
======================  =====================================================

``|`` is union, ``-`` difference, ``&`` intersection; ``&`` binds tighter, the
others from left to right. ``-`` is an operator only with a space (or a
parenthesis, a quote, or the end of a ``layer[…]``) before it; inside a name it
is a character: ``q-proj.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from .errors import UsageError, nearest
from .program import Program
from .structure import ROLES, Structure, find_structure

ATOMS = ("all", *ROLES, "layer")

_LAYER = re.compile(r"layer\[\s*(-?\d*)\s*(?:(:)\s*(-?\d*)\s*)?\]")
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>"[^"]*"|'[^']*')
      | (?P<layer>layer\[[^\]]*\])
      | (?P<operator>[|&()]|-(?=[\s("']|$))
      | (?P<glob>[^\s|&()"']+)
    )""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


def select(text: str, program: Program, structure: Structure | None = None) -> frozenset[str]:
    """Logical names of the weights that a selector means.

    Args:
        text: the selector.
        program: gets fake values if it has none.
        structure: of ``program``, where the caller has it already.

    Raises:
        UsageError: for a selector that does not parse, with a caret at the
            place; for a glob, a layer or a whole that matches nothing.
    """
    structure = structure or find_structure(program)
    found = _Selection(text, program, structure).evaluate()
    if not found:
        raise UsageError(
            f"the selector {text!r} matches no weight", fix=f"choose from: {_counts(structure)}"
        )
    return found


def check_selector(text: str) -> None:
    """Refuses a selector that no program could be asked with; call it before there is one.

    Raises:
        UsageError: with a caret at the place that does not parse.
    """
    _Syntax(text).evaluate()


class _Selection:
    """Recursive descent over the tokens of one selector.

    sum := meet (("|" | "-") meet)*,  meet := atom ("&" atom)*
    """

    def __init__(self, text: str, program: Program, structure: Structure) -> None:
        self.text, self.program, self.structure = text, program, structure
        self.tokens = self._tokens()
        self.at = 0

    def evaluate(self) -> frozenset[str]:
        found = self._sum()
        if (token := self._peek()) is not None:
            raise self._error("expected an operator (| & -)", token.start)
        return found

    def _sum(self) -> frozenset[str]:
        found = self._meet()
        while (token := self._peek()) is not None and token.text in ("|", "-"):
            if token.kind != "operator":
                break
            self.at += 1
            other = self._meet()
            found = found | other if token.text == "|" else found - other
        return found

    def _meet(self) -> frozenset[str]:
        found = self._atom()
        while (token := self._peek()) is not None and token.text == "&":
            self.at += 1
            found &= self._atom()
        return found

    def _atom(self) -> frozenset[str]:
        token = self._peek()
        if token is None:
            raise self._error("expected a role, a layer or a name", len(self.text))
        self.at += 1
        if token.text == "(" and token.kind == "operator":
            inside = self._sum()
            closing = self._peek()
            if closing is None or closing.text != ")":
                raise self._error("this parenthesis is not closed", token.start)
            self.at += 1
            return inside
        if token.kind == "operator":
            raise self._error("expected a role, a layer or a name", token.start)
        if token.kind == "quoted":
            return self._glob(token.text[1:-1])
        if token.kind == "layer":
            return self._layers(token)
        if token.text == "all":
            return self.structure.parameters
        if token.text in self.structure.roles:
            return self.structure.roles[token.text]
        return self._glob(token.text)

    def _range(self, token: _Token) -> tuple[str, str | None, str | None]:
        """What stands before the colon, the colon, and what stands after it."""
        parsed = _LAYER.fullmatch(token.text)
        if parsed is None or token.text == "layer[]":
            raise self._error("expected layer[2] or layer[0:4]", token.start)
        low, colon, high = parsed.groups()
        return low, colon, high

    def _layers(self, token: _Token) -> frozenset[str]:
        low, colon, high = self._range(token)
        layers = self.structure.layers
        if colon:
            chosen = layers[int(low) if low else None : int(high) if high else None]
        else:
            chosen = layers[int(low) :][:1] if -len(layers) <= int(low) < len(layers) else ()
        if not chosen:
            there = f"layer[0] to layer[{len(layers) - 1}]" if layers else "no repeated block"
            raise UsageError(f"{token.text} is not there", where=self.text, fix=f"there is {there}")
        return frozenset().union(*(layer.names for layer in chosen))

    def _glob(self, pattern: str) -> frozenset[str]:
        names = _aliases(self.program, self.structure.parameters)
        found = frozenset(own for name, own in names.items() if fnmatchcase(name, pattern))
        if found:
            return found
        plain = re.fullmatch(r"[a-z]+", pattern)
        known: Iterable[str] = ATOMS if plain else names
        raise UsageError(
            f"{pattern!r} matches no weight",
            where=f"in the selector {self.text!r}",
            fix=f"{nearest(pattern, known)}; this program has {_counts(self.structure)}"
            if plain
            else nearest(pattern, known),
        )

    def _tokens(self) -> list[_Token]:
        tokens: list[_Token] = []
        position = 0
        while position < len(self.text.rstrip()):
            found = _TOKEN.match(self.text, position)
            if found is None:
                raise self._error("this quote is not closed", _skip(self.text, position))
            kind = str(found.lastgroup)
            tokens.append(_Token(kind, found[kind], found.start(kind)))
            position = found.end()
        return tokens

    def _peek(self) -> _Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _error(self, what: str, start: int) -> UsageError:
        return UsageError(
            f"the selector does not parse: {what}",
            where=f"{self.text}\n  {' ' * start}^",
            fix='for example: "ffn | attention - head", "layer[0:4] & norm", "*.weight"',
        )


class _Syntax(_Selection):
    """The same descent without a program: every atom that parses is empty."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.at = text, [], 0
        self.structure = _NOTHING
        self.tokens = self._tokens()

    def _layers(self, token: _Token) -> frozenset[str]:
        self._range(token)
        return frozenset()

    def _glob(self, pattern: str) -> frozenset[str]:
        return frozenset()


_NOTHING = Structure(dict.fromkeys(ROLES, frozenset()), frozenset(), {}, (), (), (), ())


def _skip(text: str, position: int) -> int:
    return position + len(text[position:]) - len(text[position:].lstrip())


def _aliases(program: Program, parameters: frozenset[str]) -> dict[str, str]:
    """Every name a weight goes by, with the one that the graph reads."""
    names = {name: name for name in parameters}
    for tied in program.ties:
        read = sorted(tied & parameters)
        names.update(dict.fromkeys(tied, read[0]) if len(read) == 1 else {})
    return names


def _counts(structure: Structure) -> str:
    """``all (38), ffn (8), …, layer[0:2]``: what matches something."""
    parts = [f"all ({len(structure.parameters)})"]
    parts += [f"{role} ({len(structure.roles[role])})" for role in ROLES if structure.roles[role]]
    if structure.layers:
        parts.append(f"layer[0:{len(structure.layers)}]")
    return ", ".join(parts)
