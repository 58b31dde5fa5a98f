"""From an ``nn.Module`` or an exported program to a program's graph."""

from .module import capture_exported, capture_module, drop_outputs

__all__ = ["capture_exported", "capture_module", "drop_outputs"]
