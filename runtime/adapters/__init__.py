"""Adapters on disk, without the model: ftc's own folders, and PEFT's."""

from .files import load_adapters, save_adapters
from .peft import load_peft, save_peft

__all__ = ["load_adapters", "load_peft", "save_adapters", "save_peft"]
