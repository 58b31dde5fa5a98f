"""What the parts of a model are, found in its graph alone."""

from .attention import AttentionCore
from .feedforward import FeedForward
from .head_rows import HeadRows, head_rows
from .layers import Layer
from .norms import Norm
from .rotary import Rotary
from .structure import ROLES, Structure, find_structure

__all__ = ["ROLES", "AttentionCore", "FeedForward", "HeadRows", "Layer", "Norm", "Rotary",
           "Structure", "find_structure", "head_rows"]  # fmt: skip
