"""Engines of several processes, over torch.distributed: one mesh, every product of its axes."""

from __future__ import annotations

from ftc.runtime.training.engines.mesh import Mesh
from ftc.runtime.training.engines.world import Alone, LostProcess, World, is_main

__all__ = ["Alone", "LostProcess", "Mesh", "World", "is_main"]
