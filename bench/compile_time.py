"""What a compilation costs, against torch.onnx.export of the same model in the same run.

Every measurement is a process of its own; processor time and peak memory are what
the kernel says of it, with one thread. The command that is timed is the whole ``ftc compile MODEL
--passes int8``: capture, passes with their proofs, lowering, saving, parity and
latency. What it is compared with is the call of ``torch.onnx.export`` alone, and
with loading. Then random Llamas of 12, 24 and 48 layers: how far time and memory
are from a line.

    python bench/compile_time.py [--model GGUF] [--json] [--skip-export] [--skip-layers]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import smollm2

_FTC = "import sys; from ftc.cli import main; sys.argv = ['ftc', *sys.argv[1:]]; main()"
_EXPORT = """
import json, sys, time
import torch
from pathlib import Path
from ftc.graph.sources.gguf import load_gguf
model = load_gguf(Path(sys.argv[1]), None).model.eval()
loaded = time.process_time()
ids = torch.arange(26).view(2, 13)
kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in kwargs}
with torch.no_grad():
    torch.onnx.export(model, (), sys.argv[2], kwargs=kwargs, dynamic_shapes=dims, dynamo=True,
                      verbose=False)
print(json.dumps({"loading": loaded, "export": time.process_time() - loaded}))
"""
_LLAMA = """
import sys, transformers
config = transformers.LlamaConfig(
    hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=4096, max_position_embeddings=512, num_hidden_layers=int(sys.argv[1]))
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[2])
"""


# One thread each: threads that wait for each other on a busy machine spin, and are counted.
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def child(code: str, *arguments: str) -> dict[str, Any]:
    """Runs Python code in a process; its processor seconds, peak bytes and output."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        actions = [(os.POSIX_SPAWN_DUP2, f.fileno(), n) for f, n in ((out, 1), (err, 2))]
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        pid = os.posix_spawn(sys.executable, command, _ENVIRONMENT, file_actions=actions)
        _, status, used = os.wait4(pid, 0)
        if status:
            err.seek(0)
            sys.exit(f"{' '.join(arguments)} ended with {status}:\n{err.read()[-2000:]}")
        out.seek(0)
        return {"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024,
                "out": out.read()}  # fmt: skip


def compile_cost(model: Path, scratch: Path) -> dict[str, float]:
    """Processor seconds and peak bytes of one ``ftc compile``, and its weights' bytes."""
    ran = child(_FTC, "compile", str(model), "--passes", "int8", "-o", str(scratch / "out"),
                "--force", "--json")  # fmt: skip
    report = json.loads(ran["out"])
    return {"cpu": ran["cpu"], "peak": ran["peak"], "weights": report["steps"][0]["bytes"]}


def against_export(model: Path, scratch: Path) -> dict[str, float]:
    """Both on the same model; ratios of processor time."""
    ours = compile_cost(model, scratch)
    ran = child(_EXPORT, str(model), str(scratch / "torch.onnx"))
    theirs = json.loads(ran["out"].splitlines()[-1])
    return {
        "ftc cpu": ours["cpu"],
        "ftc peak": ours["peak"],
        "fp32 weights": ours["weights"],
        "ftc peak / weights": ours["peak"] / ours["weights"],
        "export cpu": theirs["export"],
        "export with loading cpu": ran["cpu"],
        "export peak": ran["peak"],
        "ftc / export": ours["cpu"] / theirs["export"],
        "ftc / export with loading": ours["cpu"] / ran["cpu"],
    }


def by_layers(counts: tuple[int, ...], scratch: Path) -> list[dict[str, float]]:
    """Costs of random Llamas, and how far each is from the line through all."""
    rows: list[dict[str, float]] = []
    for layers in counts:
        folder = scratch / f"llama-{layers}"
        child(_LLAMA, str(layers), str(folder))
        rows.append({"layers": layers, **compile_cost(folder, scratch)})
    for key in ("cpu", "peak"):
        line = _line([row["layers"] for row in rows], [row[key] for row in rows])
        for row in rows:
            row[f"{key} off the line"] = row[key] / line(row["layers"]) - 1
    return rows


def _line(xs: list[float], ys: list[float]) -> Any:
    """The least squares line."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )
    return lambda at: y + slope * (at - x)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; SmolLM2 by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--skip-export", action="store_true")
    parser.add_argument("--skip-layers", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # what `ftc` sets for itself: both alike
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if not options.skip_export:
            found["against export"] = against_export(options.model or smollm2(), Path(scratch))
        if not options.skip_layers:
            found["by layers"] = by_layers((12, 24, 48), Path(scratch))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.get("against export", {}).items():
        print(f"{name:28} {_text(name, value)}")
    for row in found.get("by layers", []):
        print("  ".join(f"{name} {_text(name, value)}" for name, value in row.items()))


def _text(name: str, value: float) -> str:
    if "line" in name:
        return f"{value:+.1%}"
    if "/" in name:
        return f"{value:.2f}"
    if "peak" in name or "weights" in name:
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.1f} s" if "cpu" in name else f"{value:.0f}"


if __name__ == "__main__":
    main()
