"""A program as a folder that a person can read and nobody can hide code in."""

from .bundle import FORMAT, load_bundle, save_bundle
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
