"""Numbers and names in sentences: of notes, errors and reports.

>>> plural(1, "weight"), plural(1234, "weight"), plural(2, "entry", "entries")
('1 weight', '1,234 weights', '2 entries')
>>> listed(["a", "b", "c", "d"])
'a, b, c and 1 more'
"""

from __future__ import annotations

from collections.abc import Sequence


def plural(number: int, noun: str, many: str | None = None) -> str:
    """``number`` of what ``noun`` names; ``many`` is its plural where that is not ``noun`` + s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of ``names``, as many as ``most``, and how many more."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
