"""Some tensors of a bundle as arrays, for what does without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ftc.graph.errors import BundleError

from .head import GRAPH, WEIGHTS, read_json


def read_arrays(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of a bundle by name, read alone: see :mod:`ftc.graph.bundle.tensor_file`.

    Raises:
        BundleError: for one that it has not.
    """
    from safetensors import SafetensorError, safe_open

    facts = read_json(folder / GRAPH)["tensors"]
    found = {}
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            for name in names:
                source = facts[name].get("of", name)
                array, order = file.get_tensor(source), facts[source].get("order")
                found[name] = array if order is None else array.transpose(np.argsort(order))
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"{folder / WEIGHTS} is damaged: {error}", fix="make the bundle again"
        ) from None
    return found
