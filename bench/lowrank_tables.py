"""What is cut where tables may be, too: MiniLM, products alone beside products and embeddings.

Half of a small encoder's weights are its vocabulary. At each share of *all* these weights,
both routes are cut to one size of the whole program in bytes, by one budget each:

    python bench/lowrank_tables.py [--removed 10 20 30] [--json FILE]

Calibrated and judged as ``bench/lowrank.py`` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lowrank_judge import Model
from tell import say

from ftc.graph.cost import cost
from ftc.graph.matrices import Matrix, matrices
from ftc.passes.text import parse_pass

ROUTES = {"product": '"product - embedding"', "product | embedding": '"product | embedding"'}


def measure(model: Model, removed: float) -> list[dict[str, Any]]:
    """Both routes at one share."""
    found = [(m, m.of(model.program).numel())
             for m in matrices(model.program) if isinstance(m, Matrix)]  # fmt: skip
    everything = sum(size for _, size in found)
    rows = []
    for route, select in ROUTES.items():
        own = sum(size for m, size in found if not m.is_table or "|" in route)
        budget = round(1 - removed * everything / own, 4)
        say(f"minilm: {route}, {removed:.0%} of all removed, budget {budget}")
        result = parse_pass(f"lowrank{{budget={budget},select={select}}}")(model.program, model.ctx)
        rows.append(
            {
                "select": route,
                "removed": removed,
                "budget": budget,
                "bytes": cost(result.program).bytes,
                **model.judged(result.program),
            }
        )
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--removed", type=int, nargs="+", default=[10, 20, 30], metavar="PERCENT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = Model("minilm", 0)
    rows = [row for percent in options.removed for row in measure(model, percent / 100)]
    whole = cost(model.program).bytes
    print(f"{'select':22}{'removed':>8}{'budget':>8}{'of the file':>13}"
          f"{'cosine':>8}{'least':>8}{'order':>8}")  # fmt: skip
    for row in rows:
        print(f"{row['select']:22}{row['removed']:8.0%}{row['budget']:8.3f}"
              f"{row['bytes'] / whole:13.2%}"
              + "".join(f"{row[name]:8.3f}" for name in ("cosine", "least", "order")))  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
