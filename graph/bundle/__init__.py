"""A program as a folder that a person can read and nobody can hide code in."""

from .bundle import FORMAT, check_output, is_bundle, load_bundle, save_bundle

__all__ = ["FORMAT", "check_output", "is_bundle", "load_bundle", "save_bundle"]
