"""What several passes ask of their options, refused in the same words."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Literal

from ftc.graph.errors import UsageError

if TYPE_CHECKING:
    from .base import Pass


def check_share(
    given: Pass, option: str, usual: float,
    interval: Literal["(0, 1]", "(0, 1)", "[0, 1)", "[0, 1]"] = "(0, 1]",
) -> None:  # fmt: skip
    """Refuses a share that is not in ``interval``; None is none.

    Args:
        given: the pass, whose field it is.
        option: the field's name.
        usual: what the fix shows, unless a percentage was meant, not far below it.
        interval: of the numbers that are legal.

    Raises:
        UsageError: with the share that was meant where the number is a percentage.
    """
    share: float | None = getattr(given, option)
    if share is None or 0 < share < 1:
        return
    if (share == 0 and interval[0] == "[") or (share == 1 and interval[-1] == "]"):
        return
    meant = share / 100 if 10 * usual <= share < 100 else usual
    fixed = copy(given)
    object.__setattr__(fixed, option, meant)  # what else may be wrong is not checked here
    raise UsageError(
        f"{given.name}{{{option}={share:g}}}: {option} lies in {interval}", fix=fixed.spec
    )
