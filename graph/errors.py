"""Errors that speak to their reader: what went wrong, where, and the fix.

Every error a user can cause derives from :class:`FtcError` and prints as::

    PreconditionError: lowrank{rank=64}: rank exceeds min(48, 768) of encoder.layer.3.fc1.weight
      node linear_7 | module encoder.layer.3.fc1 | modeling_x.py:41
      fix: choose rank <= 48, or narrow the selection

The command line prints that text without a traceback and leaves with
``exit_code``: 2 when the call was wrong, 1 when a promise or a budget was
broken. An invariant of ftc's own is an ``assert``, never an ``FtcError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class FtcError(Exception):
    """Base of every error a user can cause.

    Args:
        what: one sentence, without a final full stop where it ends in a name.
        where: the place, as :func:`ftc.graph.provenance.describe` prints a node,
            or a file and line.
        fix: what to do instead, as an imperative.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(FtcError):
    """The call itself is wrong: an unknown pass, option, selector, task or flag."""


class SourceError(FtcError):
    """The model that was named cannot be read, or must not be (a pickle)."""


class CaptureError(FtcError):
    """torch.export could not trace the model."""


class BundleError(FtcError):
    """A bundle on disk is damaged, forged, or of a later format."""


class WriteError(FtcError):
    """A file cannot be written: the disk is full, or the place is not to be written to."""

    exit_code = 1


class PreconditionError(FtcError):
    """A pass was asked for something that this program does not allow."""


class OrderError(UsageError):
    """The passes of a pipeline cannot run in the order given."""


class LoweringError(FtcError):
    """An operator has no translation to the target format."""


class PromiseError(FtcError):
    """A pass changed what it promised not to change; the result is withheld."""

    exit_code = 1


class BudgetError(PromiseError):
    """A measured drift or size exceeds the budget the user gave."""


class VerifyError(PromiseError):
    """A program breaks a rule of :mod:`ftc.graph.verify`."""


_LISTED = 15


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """The known words nearest to ``word``, as the text of a fix.

    >>> nearest("lowrnk", ["int8", "lowrank"])
    'did you mean lowrank?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(names) > _LISTED:
        return f"known: {', '.join(names[:_LISTED])} and {len(names) - _LISTED} more"
    return f"known: {', '.join(names)}" if names else "none are known"
