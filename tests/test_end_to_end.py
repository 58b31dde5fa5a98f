"""The two real models, from files to answers, through the command line.

Numbers here are relations to the model as it came, in the same run. The text is
prose of the standard library's docstrings, which nothing was calibrated on.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftc.graph.bundle import load_bundle
from ftc.graph.quantize import Scheme, choose_qparams, dequantize, quantize
from ftc.graph.sources import capture
from ftc.runtime.engine import OnnxEngine, open_engine
from ftc.runtime.parity import check_parity
from ftc.runtime.text import encode, need_tokenizer

from .conftest import Command
from .prose import paragraphs, sentences

INT16 = 2**15 - 1
quantized_linear = torch.ops.ftc.quantized_linear.default


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty sentences, as rows of a file."""
    path = tmp_path_factory.mktemp("data") / "sentences.jsonl"
    chosen = sentences()[:: len(sentences()) // 30][:30]
    path.write_text("\n".join(json.dumps({"text": s}) for s in chosen))
    return path


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text("\n\n".join(paragraphs()))
    return path


def test_minilm_is_a_quarter_and_embeds_the_same(
    compiled_minilm: Path, minilm: Path, rows: Path, command: Command
) -> None:
    assert (compiled_minilm / "model.onnx").stat().st_size <= 24e6
    found = command("eval", compiled_minilm, "--data", rows, "--metric", "cosine",
                    "--against", minilm, "--json").data  # fmt: skip
    assert found["details"]["texts"] == 30 and "onnxruntime" in found["engines"][0]
    assert found["details"]["least"] >= 0.98
    assert found["value"] >= found["details"]["least"]


def test_minilm_says_what_lowrank_found(compiled_minilm: Path) -> None:
    """The default leaves what does not pay alone, and says so."""
    steps = {
        s["name"]: s for s in json.loads((compiled_minilm / "report.json").read_text())["steps"]
    }
    assert any("lowrank" in name for name in steps)
    assert steps["lowrank"]["drift"]["cosine_min"] > 0.999
    assert steps["lowrank"]["notes"]


def test_minilm_runs_the_same_in_both_engines(compiled_minilm: Path) -> None:
    """Also at shapes that nothing was traced or probed at, and with padding."""
    program = load_bundle(compiled_minilm)
    engine = OnnxEngine(program, compiled_minilm / "model.onnx")
    texts = [" ".join(sentences()[:n]) for n in (1, 3, 5)]
    probes = [
        encode(need_tokenizer(program), program.signature, texts),
        program.signature.probe(seed=7, batch=1, sequence=1),
        program.signature.probe(seed=7, batch=5, sequence=61),
    ]
    with torch.no_grad():
        expected = [program(probe) for probe in probes]
    check_parity(program, expected, [engine(probe) for probe in probes], probes)


def test_minilm_knows_what_is_similar(compiled_minilm: Path, command: Command) -> None:
    texts = ("A man is eating food.", "Someone has lunch.", "The sky is blue.")
    asked = [word for text in texts for word in ("--text", text)]
    found = command("run", compiled_minilm, *asked, "--json")
    near, far, other = (found.data["similarity"][i][j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert near > 0.3 > max(far, other)


def test_a_bundle_can_be_compiled_on(
    compiled_minilm: Path, tmp_path: Path, command: Command
) -> None:
    """Nothing is left to do, and what was done stays in the history."""
    out = tmp_path / "again"
    ran = command("compile", compiled_minilm, "--passes", "cleanup", "-o", out, "--json")
    assert ran.status == 0, ran.err
    specs = [record.spec for record in load_bundle(out).history]
    assert specs[-1] == "cleanup" and "int8" in specs
    assert ran.data["steps"][0]["bytes"] == ran.data["steps"][-2]["bytes"]


def test_minilms_codes_cannot_saturate(compiled_minilm: Path, minilm: Path) -> None:
    """A pair of u8 × s8 products fits 16 bits with the codes of int8, and not with all 8 bits.

    This is the sum that a machine with AVX2 and no VNNI saturates. With the
    largest unsigned input at both places of a pair it is 255 (|a| + |b|).
    """
    program = load_bundle(compiled_minilm)
    products = [n for n in program.graph.nodes if n.target is quantized_linear]
    codes = {str(n.args[1].target): program.tensor(str(n.args[1].target)) for n in products}
    assert codes and not any("none" in n.args for n in products)
    assert max(_largest_pair(t) for t in codes.values()) <= INT16
    source = capture(minilm)
    name = max(codes, key=lambda n: codes[n].numel()).removesuffix(".quantized")
    weight = source.tensor(name).detach()
    assert _largest_pair(_codes(weight, reduce_range=True)) <= INT16
    assert _largest_pair(_codes(weight, reduce_range=False)) > INT16


def _largest_pair(codes: Tensor) -> int:
    """Largest magnitude of ``255 a + 255 b`` over neighbours along the input dimension."""
    wide = codes.to(torch.int32).flatten(1)
    even = wide[:, : wide.shape[1] // 2 * 2].view(len(wide), -1, 2)
    return int((255 * even.abs()).sum(-1).max())


def _codes(weight: Tensor, *, reduce_range: bool) -> Tensor:
    scheme = Scheme(reduce_range=reduce_range)
    scale, zero = choose_qparams(weight, scheme)
    codes = quantize(weight, scale, zero, scheme)
    error = (dequantize(codes, scale, zero) - weight).abs()
    assert bool((error <= scale / 2 * (1 + 1e-4)).all())
    return codes


def test_smollm2_keeps_its_perplexity(
    compiled_smollm2: Path, smollm2: Path, prose: Path, command: Command
) -> None:
    found = command("eval", compiled_smollm2, "--data", prose, "--metric", "perplexity",
                    "--against", smollm2, "--limit", 16, "--json").data  # fmt: skip
    assert "onnxruntime" in found["engines"][0] and found["details"]["tokens"] > 1500
    assert found["value"] / found["against"] <= 1.05
    assert 5 < found["against"] < 100  # it is a language model at all


def test_smollm2_is_a_quarter(compiled_smollm2: Path) -> None:
    steps = json.loads((compiled_smollm2 / "report.json").read_text())["steps"]
    assert steps[-2]["bytes"] < 0.26 * steps[0]["bytes"]
    assert steps[-1]["bytes"] < 0.26 * steps[0]["bytes"]
    sizes = [step["bytes"] for step in steps[:-1]]
    assert all(later <= 1.001 * earlier for earlier, later in pairwise(sizes))


def test_smollm2_generates(compiled_smollm2: Path, command: Command) -> None:
    ran = command("run", compiled_smollm2, "--text", "The capital of France is",
                  "--max-new-tokens", 6)  # fmt: skip
    assert ran.status == 0 and ran.out.startswith("The capital of France is") and "Paris" in ran.out


def test_smollm2_keeps_its_ties(compiled_smollm2: Path) -> None:
    """Embedding and head read one tensor, quantized once."""
    program = open_engine(str(compiled_smollm2), "torch").program
    assert any(len(names) > 1 for names in program.ties)
    tables = [t for n, t in program.tensors() if n.endswith(".quantized") and t.shape[0] > 40_000]
    assert len(tables) == 1
