"""The routes of ``generate.py``: ways to run SmolLM2 with a cache.

A route is opened from a folder that was prepared once, and then reads texts and says
what comes next, greedily.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from models import Missing

LONGEST = 2048


class Speaker:
    """Reads a text and goes on from it.

    Args:
        start: yields tokens that follow the ids it is given.
        score: scores ``[vocabulary]`` of the token after each of the ids but the last.
    """

    def __init__(
        self,
        start: Callable[[list[int]], Iterator[int]],
        score: Callable[[list[int]], Iterator[Any]],
    ) -> None:
        self.start, self.score = start, score
        self._going: Iterator[int] = iter(())

    def first(self, ids: list[int]) -> int:
        """The token after a text that nothing is known of."""
        self._going = self.start(ids)
        return next(self._going)

    def more(self, count: int) -> None:
        """So many tokens after it."""
        for _ in range(count):
            next(self._going)


@dataclass(frozen=True)
class Route:
    """One way.

    Attributes:
        prepare: makes what is shipped from the model, in a folder; returns its files' prefix.
        open: of the folder and a number of threads.
        shipped: suffixes of the files that count as size.
    """

    prepare: Callable[[Path, Path], None]
    open: Callable[[Path, int], Speaker]
    shipped: tuple[str, ...]

    def megabytes(self, folder: Path) -> float:
        """Of the files that one ships, in millions of bytes."""
        files = (f for f in folder.rglob("*") if f.is_file() and f.suffix in self.shipped)
        return sum(f.stat().st_size for f in files) / 1e6


def hugging_face(model: Path, folder: Path) -> None:
    """The model as transformers writes it, in float32, out of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": model.name}
    made = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32, **given)
    del made.config.quantization_config  # transformers does not write a model that has one
    made.hf_quantizer, made.is_quantized = None, False
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.parent, **given).save_pretrained(folder)


def _eager(folder: Path, threads: int) -> Speaker:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(ids: list[int], past: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            out = model(torch.tensor([ids]), past_key_values=past, use_cache=True,
                        logits_to_keep=1)  # fmt: skip
        return out.logits[0, -1], out.past_key_values

    return stepwise(run)


def stepwise(run: Callable[[list[int], Any], tuple[Any, Any]]) -> Speaker:
    """Of a function from new tokens and a past to the last scores and the next past."""

    def start(ids: list[int]) -> Iterator[int]:
        past = None
        while True:
            scores, past = run(ids, past)
            ids = [int(scores.argmax())]
            yield ids[0]

    def score(ids: list[int]) -> Iterator[Any]:
        past = None
        for token in ids[:-1]:
            scores, past = run([token], past)
            yield np.asarray(scores)

    return Speaker(start, score)


def _compiled(passes: str) -> Callable[[Path, Path], None]:
    def prepare(model: Path, folder: Path) -> None:
        from ftc.runtime.compile import compile_model

        compile_model(str(model), passes, folder, task="generate", force=True)

    return prepare


def _ftc(folder: Path, threads: int) -> Speaker:
    import torch

    from ftc.runtime.decoder import Decoder
    from ftc.runtime.engine import open_engine
    from ftc.runtime.generate import next_tokens
    from ftc.runtime.threads import set_threads

    set_threads(threads)
    decoder = Decoder(open_engine(str(folder), "onnx"))

    def start(ids: list[int]) -> Iterator[int]:
        for (token,) in next_tokens(decoder, [ids]):
            yield token

    def score(ids: list[int]) -> Iterator[Any]:
        for end in range(1, len(ids)):
            yield torch.atleast_1d(decoder([ids[:end]])[0]).numpy()

    return Speaker(start, score)


def _build_genai(model: Path, folder: Path) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise Missing("onnxruntime_genai is not installed")
    source = folder.parent / "source"
    if not source.exists():
        hugging_face(model, source)
    cache = folder.parent / "genai-cache"
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source),
         "-o", str(folder), "-p", "int4", "-e", "cpu", "-c", str(cache)],
        check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    shutil.rmtree(cache, ignore_errors=True)


def _genai(folder: Path, threads: int) -> Speaker:
    import onnxruntime_genai as og

    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=1))
    model = og.Model(str(folder))

    def generator(ids: list[int]) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=LONGEST, do_sample=False)
        made = og.Generator(model, params)
        made.append_tokens(np.array([ids], np.int32))
        return made

    def start(ids: list[int]) -> Iterator[int]:
        made = generator(ids)
        while True:
            made.generate_next_token()
            yield int(made.get_next_tokens()[0])

    def score(ids: list[int]) -> Iterator[Any]:
        made = generator(ids[:1])
        for token in ids[1:]:
            yield np.asarray(made.get_logits()).reshape(-1)
            made.append_tokens(np.array([[token]], np.int32))

    return Speaker(start, score)


def _build_openvino(model: Path, folder: Path) -> None:
    try:
        import nncf
        import openvino as ov
        from openvino._offline_transformations import apply_make_stateful_transformation
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from None
    from ftc.graph.cache_inputs import present_of
    from ftc.graph.sources import capture
    from ftc.passes.pipeline import Pipeline
    from ftc.runtime.lower import lower, save_onnx

    folder.mkdir(parents=True)
    program = Pipeline.parse("cleanup,cache").run(capture(str(model))).program
    save_onnx(lower(program, "standard"), path := folder / "whole.onnx")
    whole = ov.Core().read_model(path)
    names = [name for each in whole.inputs for name in each.names if name.startswith("past_")]
    pairs = {name: present_of(name) for name in names if name != "past_mask"}
    apply_make_stateful_transformation(whole, pairs)
    small = nncf.compress_weights(whole, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=32)
    ov.save_model(small, folder / "small.xml")
    for file in folder.glob("whole.onnx*"):
        file.unlink()


def _openvino(folder: Path, threads: int) -> Speaker:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(folder / "small.xml", "CPU", settings).create_infer_request()

    def run(ids: list[int], past: Any) -> tuple[Any, Any]:
        if past is None:
            request.reset_state()
            for each in request.query_state():  # which begins with a batch of 0
                _, heads, _, width = each.state.shape
                each.state = ov.Tensor(np.zeros((1, heads, 0, width), np.float32))
        before = past or 0
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64),
                "past_mask": np.ones((1, before), np.int64)}  # fmt: skip
        return request.infer(feed)["logits"][0, -1], before + len(ids)

    return stepwise(run)


def _ours(passes: str) -> Route:
    return Route(_compiled(passes), _ftc, (".onnx", ".data"))


ROUTES = {
    "transformers fp32": Route(hugging_face, _eager, (".safetensors",)),
    "OpenVINO int4": Route(_build_openvino, _openvino, (".xml", ".bin")),
    "onnxruntime-genai int4": Route(_build_genai, _genai, (".onnx", ".data")),
    **{f"ftc {passes}": _ours(passes) for passes in
       ("int4", "int4{keep=false}", "int4{keep=false},int8_cache")},
}  # fmt: skip
