"""A program as a folder that a person can read and nobody can hide code in.

What only looks at one imports no torch.
"""

from typing import TYPE_CHECKING

from ftc.graph.lazy import importing

if TYPE_CHECKING:
    from .bundle import load_bundle, save_bundle
    from .head import FORMAT
    from .output import cannot_write, check_output, check_parents, is_bundle
    from .replace_folder import write_folder

__all__ = [
    "FORMAT",
    "cannot_write",
    "check_output",
    "check_parents",
    "is_bundle",
    "load_bundle",
    "save_bundle",
    "write_folder",
]
__getattr__ = importing(__name__, {
    "FORMAT": "head",
    "cannot_write": "output",
    "check_output": "output",
    "check_parents": "output",
    "is_bundle": "output",
    "load_bundle": "bundle",
    "save_bundle": "bundle",
    "write_folder": "replace_folder",
})  # fmt: skip
