"""What the parts of a model are, found in its graph alone."""

from .attention import AttentionCore
from .feedforward import FeedForward
from .layers import Layer
from .norms import Norm
from .structure import ROLES, Structure, find_structure

__all__ = ["ROLES", "AttentionCore", "FeedForward", "Layer", "Norm", "Structure", "find_structure"]
