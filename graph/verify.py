"""Whether a program is one: checked after capture, after every pass and after loading.

The invariants are the table :data:`ftc.graph.rules.RULES`. Time is linear in
the graph, a few milliseconds for a model of thirty layers.
"""

from __future__ import annotations

from .errors import VerifyError
from .program import Program
from .provenance import describe
from .rules import RULES, View


def verify(program: Program) -> None:
    """Checks every rule, in order.

    Raises:
        VerifyError: for the first rule that is broken, with its sentence, the
            node and the fix.
    """
    view = View(program)
    for rule in RULES:
        for breach in rule(view):
            name = rule.__name__.replace("_", "-")
            sentence = (rule.__doc__ or name).rstrip(".").lower()
            raise VerifyError(
                f"rule {name}: {sentence}; but {breach.detail}",
                where=describe(breach.node) if breach.node is not None else None,
                fix=breach.fix,
            )
