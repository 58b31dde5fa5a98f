"""Layers of one list of modules that are alike in everything but the content of their tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_LEAST = 3  # of a kind, below which nothing is gained
_HOOKS = "_hooks"


def alike_layers(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Groups of three or more layers by path, each group of one list (or sequence) of modules.

    Two are alike when class, attributes, shapes, dtypes and submodules agree, neither has
    hooks, and every list with an entry for each layer that they hold (in a configuration:
    which kind each layer is) has equal entries for both. Their own numbers may differ.
    Layers that share a tensor, with each other or with anything else, are like none.
    """
    owners = Counter(id(t) for _, t in model.named_parameters(remove_duplicate=False))
    owners.update(id(t) for _, t in model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield from _groups(path, list(module.children()), owners)


def _groups(
    path: str, layers: list[nn.Module], owners: Counter[int]
) -> Iterator[dict[str, nn.Module]]:
    groups: list[list[int]] = []
    if len(layers) < _LEAST:
        return
    for i, layer in enumerate(layers):
        if not _alone(layer, owners):
            continue
        own = next((g for g in groups if _alike(layers[g[0]], layer, g[0], i, len(layers))), None)
        groups.append([i]) if own is None else own.append(i)
    for group in groups:
        if len(group) >= _LEAST:
            yield {f"{path}.{i}".lstrip("."): layers[i] for i in group}


def _alone(layer: nn.Module, owners: Counter[int]) -> bool:
    """Whether no module but ``layer`` has its tensors, and nobody listens to it."""
    tensors = [*layer.parameters(), *layer.buffers()]
    hooked = any(v for m in layer.modules() for k, v in vars(m).items() if k.endswith(_HOOKS))
    return bool(tensors) and not hooked and all(owners[id(t)] == 1 for t in tensors)


def _alike(a: nn.Module, b: nn.Module, i: int, j: int, count: int) -> bool:
    """Whether two modules, in layers ``i`` and ``j`` of ``count``, would trace alike."""
    one, other = vars(a), vars(b)
    if type(a) is not type(b) or one.keys() != other.keys():
        return False
    for name, x in one.items():
        y = other[name]
        if name in ("_parameters", "_buffers"):
            if x.keys() != y.keys() or any(_form(x[key]) != _form(y[key]) for key in x):
                return False
        elif name == "_modules":
            same = x.keys() == y.keys() and all(
                x[key] is y[key] is None or _alike(x[key], y[key], i, j, count) for key in x
            )
            if not same:
                return False
        elif not _same(x, y, i, j) or not _says_the_same(x, i, j, count):
            return False
    return True


def _form(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def _same(x: Any, y: Any, i: int, j: int) -> bool:
    if x is y:
        return True
    if type(x) is not type(y) or isinstance(x, Tensor):
        return False
    if type(x) is int and x - i == y - j:
        return True  # the layer's number
    return (x == y) is True


def _says_the_same(held: Any, i: int, j: int, count: int) -> bool:
    """Whether lists with an entry a layer, in what a module holds, do not tell the two apart."""
    if isinstance(held, (type, nn.Module)) or not hasattr(held, "__dict__"):
        return True
    lists = (v for v in vars(held).values() if isinstance(v, (list, tuple)) and len(v) == count)
    return all(each[i] == each[j] for each in lists)
