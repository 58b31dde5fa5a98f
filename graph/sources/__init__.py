"""Where models come from: folders, GGUF files, bundles, archives, factories, modules."""

from .sources import capture

__all__ = ["capture"]
