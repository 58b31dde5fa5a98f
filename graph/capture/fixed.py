"""Why a model fixes a dimension that was to be dynamic, and where.

A loop over positions, or a size turned into a Python number, holds for the
example's size alone. torch says that this happened but not where; traced once
more with the dimension free to become fixed, its shape environment says the line.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from ftc.graph.errors import CaptureError
from ftc.graph.symbols import expression

Dynamic = Mapping[str, Mapping[int, str]]


def explain_fixed(
    traced: ExportedProgram, dynamic: Dynamic, is_model_line: Callable[[str], bool]
) -> CaptureError:
    """The error for a model whose sizes cannot all stay dynamic.

    Args:
        traced: the model, traced with dimensions that may become fixed.
        dynamic: those that were to be dynamic, ``{input: {axis: name}}``.
        is_model_line: whether a file is the model's own and no library's beneath it.
    """
    fixed = _fixed(traced, dynamic)
    sizes = {dim: size for *_, dim, size in fixed}
    kept = {name: {a: d for a, d in axes.items() if d not in sizes}
            for name, axes in dynamic.items()}  # fmt: skip
    named = ", ".join(f"{dim} = {size}" for dim, size in sorted(sizes.items()))
    return CaptureError(
        "the model uses the size of a dimension as a plain number, as a loop over positions does: "
        f"its graph would hold for the example's {named} alone",
        where=_line(traced, is_model_line),
        fix="replace what that line does by an operation on the whole tensor; or capture that one "
        f"size in Python: capture(source, examples=..., dynamic={kept})",
    )


def _fixed(traced: ExportedProgram, dynamic: Dynamic) -> list[tuple[str, int, str, int]]:
    """``(input, axis, name, size)`` of what was to be dynamic and is not."""
    found = []
    for node in traced.graph.nodes:
        fake = node.meta.get("val")
        if node.op == "placeholder" and isinstance(fake, Tensor):
            for axis, dim in dynamic.get(str(node.target), {}).items():
                size = expression(fake.shape[axis])
                if isinstance(size, int) or size.is_number:
                    found.append((str(node.target), axis, dim, int(size)))
    return found


def _line(traced: ExportedProgram, is_model_line: Callable[[str], bool]) -> str | None:
    """``file.py:12: code`` of the last line of the model that turned a symbol into a number."""
    fakes = (node.meta.get("val") for node in traced.graph.nodes)
    mode: Any = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    env: Any = getattr(mode, "shape_env", None)
    places = []
    for symbol, place in getattr(env, "replacements_slocs", {}).items():
        frame = place.framework_loc
        if getattr(env.replacements.get(symbol), "is_number", False) and frame is not None:
            places.append((frame.filename, frame.lineno))
    own = [place for place in places if is_model_line(place[0])]
    if not own:
        return None
    file, number = own[-1]
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"
