"""The models of ``quantize.py`` and the routes that each of them is taken on.

A route is a function of a model and a scratch folder that returns what runs
(inputs by name to an array) and the millions of bytes that one would ship.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from models import Missing

Feed = dict[str, np.ndarray[Any, Any]]
Run = Callable[[Feed], np.ndarray[Any, Any]]


@dataclass
class Model:
    """A model under test.

    Attributes:
        name: ``minilm`` or ``smollm2``.
        source: what ``ftc compile`` takes.
        module: the model in torch.
        tokenizer: its tokenizer.
        inputs: names of its inputs.
        tokens: size of its vocabulary.
    """

    name: str
    source: str
    module: torch.nn.Module
    tokenizer: Any
    inputs: tuple[str, ...]
    tokens: int

    def random(self, batch: int, length: int) -> Feed:
        """Random tokens under a full mask."""
        ids = np.random.default_rng(0).integers(5, self.tokens, (batch, length))
        return self._feed(ids, np.ones_like(ids))

    def texts(self, quick: bool) -> list[Feed]:
        """Prose: padded batches of sentences, or windows of 128 tokens."""
        from ftc.tests.prose import paragraphs, sentences

        if self.name == "minilm":
            given = list(sentences())[: 32 if quick else 100]
            batches = [given[i : i + 10] for i in range(0, len(given), 10)]
            coded = [self.tokenizer(b, padding=True, return_tensors="np") for b in batches]
            return [self._feed(c["input_ids"], c["attention_mask"]) for c in coded]
        ids = self.tokenizer("\n\n".join(paragraphs()), return_tensors="np")["input_ids"][0]
        windows = ids[: 128 * (8 if quick else 32)].reshape(-1, 1, 128)
        return [self._feed(each, np.ones_like(each)) for each in windows]

    def _feed(self, ids: Any, mask: Any) -> Feed:
        feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
        return feed


def minilm() -> Model:
    """A sentence encoder of 22 million weights."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(models.minilm())
    names = ("input_ids", "attention_mask", "token_type_ids")
    module = AutoModel.from_pretrained(folder).eval()
    return Model("minilm", folder, module, AutoTokenizer.from_pretrained(folder), names, 30000)


def smollm2() -> Model:
    """A language model of 135 million weights, from a 4-bit file."""
    from transformers import AutoTokenizer

    from ftc.graph.sources.gguf import load_gguf

    path = models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    names = ("input_ids", "attention_mask")
    return Model("smollm2", str(path), load_gguf(path, None).model.eval(), tokenizer, names, 49000)


class _Plain(torch.nn.Module):
    """A model that takes tensors in order and returns its first output."""

    def __init__(self, inner: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if hasattr(self.inner.config, "use_cache"):
            given["use_cache"] = False
        return self.inner(**given)[0]


def _torch(module: torch.nn.Module, names: tuple[str, ...]) -> Run:
    torch.set_num_threads(1)

    def run(feed: Feed) -> Any:
        with torch.no_grad():
            return _Plain(module, names)(*(torch.from_numpy(feed[n]) for n in names)).numpy()

    return run


def open_session(path: Path) -> Any:
    """The file in onnxruntime, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _onnx(path: Path) -> tuple[Run, float]:
    session = open_session(path)
    names = [each.name for each in session.get_inputs()]
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
    return lambda feed: session.run(None, {n: feed[n] for n in names})[0], size


def _exported(model: Model, scratch: Path) -> Path:
    """The torch exporter's file, made once."""
    path = scratch / "exported.onnx"
    if path.exists():
        return path
    ids = torch.arange(26).view(2, 13) + 5
    given = tuple(torch.ones_like(ids) if "mask" in n else ids * ("type" not in n)
                  for n in model.inputs)  # fmt: skip
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Plain(model.module, model.inputs), given, path, dynamo=True, verbose=False,
            input_names=model.inputs, dynamic_shapes=(tuple(axes for _ in given),),
            external_data=False,
        )  # fmt: skip
    return path


def eager(model: Model, scratch: Path) -> tuple[Run, float]:
    """The model as it is."""
    size = sum(p.numel() * p.element_size() for p in model.module.parameters()) / 1e6
    return _torch(model.module, model.inputs), size


def exported(model: Model, scratch: Path) -> tuple[Run, float]:
    """The torch exporter's model in onnxruntime."""
    return _onnx(_exported(model, scratch))


def dynamic(model: Model, scratch: Path, **options: Any) -> tuple[Run, float]:
    """onnxruntime's own quantization, weights int8 per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = scratch / f"dynamic{len(options)}.onnx"
    if not path.exists():
        quantize_dynamic(_exported(model, scratch), path, per_channel=True,
                         weight_type=QuantType.QInt8, **options)  # fmt: skip
    return _onnx(path)


def quantize_blocks(source: Path, path: Path, bits: int) -> None:
    """Writes an ONNX file with onnxruntime's own weights in groups of 32, accuracy level 4."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32,
                                is_symmetric=bits == 8, accuracy_level=4)  # fmt: skip
    made.process()
    made.model.save_model_to_file(str(path))


def blocks(model: Model, scratch: Path, bits: int) -> tuple[Run, float]:
    """onnxruntime's own weights in groups."""
    if not (path := scratch / f"blocks{bits}.onnx").exists():
        quantize_blocks(_exported(model, scratch), path, bits)
    return _onnx(path)


def ftc(model: Model, scratch: Path, passes: str, target: str = "portable") -> tuple[Run, float]:
    """``ftc compile``."""
    from ftc.runtime.compile import compile_model

    out = scratch / "".join(c if c.isalnum() else "_" for c in f"ftc {passes} {target}")
    if not out.exists():
        compile_model(model.source, passes, out, target=target)
    return _onnx(out / "model.onnx")


def torch_dynamic(model: Model, scratch: Path) -> tuple[Run, float]:
    """torch's dynamic int8, which is deprecated and still the one most use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(model.module, {torch.nn.Linear})
    return _torch(made, model.inputs), _saved(made, scratch)


def torchao(model: Model, scratch: Path) -> tuple[Run, float]:
    """torchao's dynamic int8, eager."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise Missing("torchao is not installed") from None
    made = copy.deepcopy(model.module)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return _torch(made, model.inputs), _saved(made, scratch)


def openvino(model: Model, scratch: Path, bits: int) -> tuple[Run, float]:
    """OpenVINO with weights compressed by NNCF, at 4 bits in groups of 32."""
    try:
        import nncf
        import openvino as ov
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from None
    if not (path := scratch / f"openvino{bits}.xml").exists():
        how = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 32} if bits == 4 else {}
        whole = ov.Core().read_model(_exported(model, scratch))
        ov.save_model(nncf.compress_weights(whole, **how), path)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(path, "CPU", settings)
    names = [each.any_name for each in compiled.inputs]
    size = sum(path.with_suffix(s).stat().st_size for s in (".xml", ".bin")) / 1e6
    return lambda feed: compiled({n: feed[n] for n in names})[0], size


def _saved(module: torch.nn.Module, scratch: Path) -> float:
    torch.save(module.state_dict(), path := scratch / "saved.pt")
    return path.stat().st_size / 1e6


@dataclass(frozen=True)
class Route:
    """How a model is turned into something that runs, and for which models."""

    make: Callable[..., tuple[Run, float]]
    options: dict[str, Any]
    models: tuple[str, ...] = ("minilm", "smollm2")

    def __call__(self, model: Model, scratch: Path) -> tuple[Run, float]:
        """What runs, and its millions of bytes."""
        return self.make(model, scratch, **self.options)


ROUTES = {
    "torch eager fp32": Route(eager, {}),
    "onnxruntime fp32, torch exporter": Route(exported, {}),
    "ftc fp32": Route(ftc, {"passes": "cleanup"}),
    "onnxruntime QInt8 per channel": Route(dynamic, {}),
    "the same, 7 bits": Route(dynamic, {"reduce_range": True}),
    "MatMulNBits 8": Route(blocks, {"bits": 8}),
    "MatMulNBits 4": Route(blocks, {"bits": 4}),
    "torch dynamic int8": Route(torch_dynamic, {}),
    "torchao int8": Route(torchao, {}),
    "OpenVINO, NNCF int8 weights": Route(openvino, {"bits": 8}),
    "OpenVINO, NNCF int4 weights": Route(openvino, {"bits": 4}),
    "ftc int8 (portable)": Route(ftc, {"passes": "int8"}),
    "ftc int8 (native)": Route(ftc, {"passes": "int8", "target": "native"}),
    "ftc int8{activation=static}": Route(ftc, {"passes": "int8{activation=static}"}),
    "ftc int8{kernel=blocked}": Route(ftc, {"passes": "int8{kernel=blocked}"}),
    "ftc int4": Route(ftc, {"passes": "int4"}),
    "ftc int4{keep=false}": Route(ftc, {"passes": "int4{keep=false}"}, ("smollm2",)),
}
