"""Generation without torch: from a bundle's head, its file for onnxruntime and its tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftc.graph.bundle import load_bundle
from ftc.graph.errors import BundleError, FtcError
from ftc.graph.sources.tokenizer import tokenizer, tokenizer_class
from ftc.runtime.compile import compile_model
from ftc.runtime.continuation import Asked, generate
from ftc.runtime.engine import OnnxEngine, open_engine
from ftc.runtime.generate import next_tokens
from ftc.runtime.sampling import Sampling
from ftc.runtime.spoken import Spoken

from .small import decoder

PROMPT = 'prompt{text="the cat sits",fold=true}'
TEXT = "a dog runs"
# What the command line runs; the last line of what is written says whether torch was imported.
COMMAND = """
import sys
from ftc.cli import ftc
from ftc.runtime.exit import run_command
status = run_command(ftc, sys.argv[1:])
print("torch" in sys.modules)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small Llamas: with a cache, behind a folded prompt, and one without a cache."""
    folder = tmp_path_factory.mktemp("spoken")
    model = decoder(folder / "model")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    for name, passes, task in (("plain", "", "generate"), ("folded", PROMPT, "generate"),
                               ("whole", "", "causal-lm")):  # fmt: skip
        compile_model(model, passes, folder / name, task=task)
    return {name: folder / name for name in ("plain", "folded", "whole")}


@pytest.mark.parametrize("name", ["plain", "folded"])
@pytest.mark.parametrize("options", [
    [], ["--temperature", "1", "--top-k", "5", "--top-p", "0.9", "--repetition-penalty", "1.3"],
    ["--chat"], ["--text", "the cat"],
])  # fmt: skip
def test_a_text_goes_on_without_torch(
    bundles: dict[str, Path], name: str, options: list[str]
) -> None:
    call = ["run", str(bundles[name]), "--text", TEXT, "--max-new-tokens", "6", "--json", *options]
    done = subprocess.run([sys.executable, "-c", COMMAND, *call], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    said, torch_was_there = done.stdout.rsplit("\n", 2)[:2]
    assert torch_was_there == "False"
    if not options:
        engine = open_engine(str(bundles[name]), "torch")
        wanted = "".join(generate(engine, TEXT, Asked(6)))
        assert json.loads(said)["continuations"] == [wanted]


@pytest.mark.parametrize("name", ["plain", "folded", "whole"])
def test_a_head_says_what_its_program_does(bundles: dict[str, Path], name: str) -> None:
    program = load_bundle(bundles[name])
    head, whole = Spoken.read(bundles[name], "model.onnx"), Spoken.of(program)
    for fact in ("task", "input_names", "output_names", "cached", "scores", "token_inputs", "most",
                 "known", "limit", "prompt", "ends"):  # fmt: skip
        assert getattr(head, fact) == getattr(whole, fact), fact
    assert head.tokens_of([TEXT]) == whole.tokens_of([TEXT])
    assert (name == "folded") == bool(head.prompt)
    past, wanted = head.past(2), whole.past(2)
    assert past.keys() == wanted.keys() and bool(past) == bool(head.prompt)
    for key, array in past.items():
        np.testing.assert_array_equal(array, wanted[key])


def test_the_program_is_read_when_it_is_asked_for(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(str(bundles["folded"]))
    assert isinstance(engine, OnnxEngine)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxEngine, "program", property(lambda _: pytest.fail("it was read")))
        assert len(list(islice(next_tokens(engine, [[5, 6, 7], [8]]), 3))) == 3
    assert engine.program.signature.task == "causal-lm" and engine.program is engine.program


def test_one_seed_draws_the_same_tokens_in_both(bundles: dict[str, Path]) -> None:
    how = Sampling(temperature=1.5, top_k=20, top_p=0.95, penalty=1.1, seed=7)
    engines = [open_engine(str(bundles["plain"]), engine) for engine in ("onnx", "torch")]
    drawn = [list(islice(next_tokens(each, [[5, 6], [7]], how), 12)) for each in engines]
    assert drawn[0] == drawn[1]


def copy_of(bundle: Path, into: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(bundle, into)
    head = json.loads((into / "ftc.json").read_text())
    edit(head)
    (into / "ftc.json").write_text(json.dumps(head))
    return into


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "model.safetensors"])
def test_what_is_read_has_the_hash_that_the_head_says(
    bundles: dict[str, Path], tmp_path: Path, name: str
) -> None:
    damaged = copy_of(bundles["folded"], tmp_path / "out", lambda _: None)
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(BundleError, match="hash") as caught:
        open_engine(str(damaged))
    assert name in str(caught.value)


def test_a_class_that_reads_no_tokenizer_is_not_used(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    wanted = Spoken.read(bundles["plain"], "model.onnx").tokens_of([TEXT])
    named = json.loads((bundles["plain"] / "ftc.json").read_text())["tokenizer"]
    assert named == tokenizer_class(bundles["plain"])
    assert type(tokenizer(bundles["plain"], named)) is type(tokenizer(bundles["plain"]))
    for number, odd in enumerate(("BertModel", "nothing of the kind", "utils", 5, None, ["a"])):
        forged = copy_of(bundles["plain"], tmp_path / str(number),
                         lambda head, odd=odd: head.update(tokenizer=odd))  # fmt: skip
        assert Spoken.read(forged, "model.onnx").tokens_of([TEXT]) == wanted
    assert "tokenizer" not in json.loads((bundles["whole"] / "ftc.json").read_text())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in inner:
        yield (*path, key)
        if isinstance(entry, (dict, list)):
            yield from places(entry, (*path, key))


@pytest.mark.parametrize("odd", [None, -1, 0, 3, "x", "input_ids", [], {}, 2**70, 0.5])
def test_a_forged_head_is_an_error_or_a_text(
    bundles: dict[str, Path], tmp_path: Path, odd: Any
) -> None:
    """Whatever stands at whatever place of the signature: never another exception."""
    signature = json.loads((bundles["folded"] / "ftc.json").read_text())["signature"]
    forged = copy_of(bundles["folded"], tmp_path / "out", lambda _: None)
    head = json.loads((forged / "ftc.json").read_text())
    for place in places(signature):
        changed = json.loads(json.dumps(signature))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = odd
        (forged / "ftc.json").write_text(json.dumps({**head, "signature": changed}))
        try:
            "".join(generate(open_engine(str(forged), "onnx"), TEXT, Asked(2)))
        except FtcError:
            continue
