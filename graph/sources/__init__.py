"""Where models come from: folders, GGUF files, bundles, archives, factories, modules."""

from typing import TYPE_CHECKING

from ftc.graph.lazy import importing

if TYPE_CHECKING:
    from .sources import capture

__all__ = ["capture"]
__getattr__ = importing(__name__, {"capture": "sources"})
