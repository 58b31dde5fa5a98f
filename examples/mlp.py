"""A module that is captured by name: ``ftc compile examples.mlp:model``."""

import torch
from torch import Tensor, nn


def model() -> tuple[nn.Module, dict[str, Tensor]]:
    """A small classifier of 64 numbers, and an example of its input.

    The example's first dimension is left free: any number of rows can be given.
    """
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
    return layers, {"input": torch.zeros(2, 64)}
