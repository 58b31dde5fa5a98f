"""From an ``nn.Module`` or an exported program to a program's graph."""

from .module import Examples, capture_exported, capture_module
from .outputs import drop_outputs

__all__ = ["Examples", "capture_exported", "capture_module", "drop_outputs"]
