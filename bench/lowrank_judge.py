"""What ``lowrank.py`` and ``lowrank_tables.py`` cut, and how well it still does."""

from __future__ import annotations

import math
from typing import Any

import torch
from models import minilm, smollm2
from torch import Tensor

from ftc.graph.products import products
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.sources.tokenizer import tokenizer
from ftc.graph.target import target
from ftc.passes.pipeline import Pipeline
from ftc.runtime.probes import make_context
from ftc.runtime.text import pad

WINDOW = 128


class Model:
    """A captured model, its calibration, and the prose it is judged on."""

    def __init__(self, name: str, windows: int) -> None:
        source: Any = minilm()
        if name == "smollm2":
            source = smollm2()
        captured = capture(str(source))
        self.name, found = name, tokenizer(captured)
        self.ctx = make_context(captured, None, target("portable"), None, None, 0)
        self.program = Pipeline.parse("cleanup,canonicalize").run(captured, self.ctx).program
        self.weights = dict(self._weights(self.program))
        self.feeds = list(self._feeds(found, windows))
        self.expected = self._said(self.program)

    def _feeds(self, found: Any, windows: int) -> Any:
        from ftc.tests.prose import paragraphs, sentences

        if self.name == "minilm":
            given = [list(found(s)["input_ids"]) for s in list(sentences())[:100]]
            for start in range(0, len(given), 10):
                yield pad(given[start : start + 10], self.program.signature, found)
            return
        ids = list(found("\n\n".join(paragraphs()))["input_ids"])
        for index in range(windows):
            rows = [ids[index * WINDOW : (index + 1) * WINDOW]]
            yield pad(rows, self.program.signature, found)

    @staticmethod
    def _weights(program: Program) -> Any:
        for product in products(program):
            if len(product.node.args[1].users) == 1:  # type: ignore[union-attr]
                yield product.weight, program.tensor(product.weight).numel()

    def removed(self, program: Program) -> float:
        """Share of the products' weights that ``program`` has not, however it stores them."""
        left = 0
        for name, tensor in program.tensors():
            whole = name.removesuffix(".quantized").removesuffix(".A").removesuffix(".B")
            left += tensor.numel() if whole in self.weights and "scale" not in name else 0
        return 1 - left / sum(self.weights.values())

    def _said(self, program: Program) -> Tensor:
        """Sentence embeddings ``[sentences, width]``, or losses of windows ``[windows]``."""
        with torch.no_grad():
            return torch.cat([self._one(program(feed), feed) for feed in self.feeds])

    def _one(self, outputs: Any, feed: Any) -> Tensor:
        if self.name == "minilm":
            mask = feed["attention_mask"][..., None].float()
            return (outputs["last_hidden_state"] * mask).sum(1) / mask.sum(1)
        scores = outputs["logits"][0, :-1]
        return torch.nn.functional.cross_entropy(scores, feed["input_ids"][0, 1:])[None]

    def judged(self, program: Program) -> dict[str, float]:
        """Accuracy of ``program``."""
        said, wanted = self._said(program), self.expected
        if self.name == "smollm2":
            value, exact = (math.exp(float(losses.mean())) for losses in (said, wanted))
            return {"perplexity": value, "ratio": value / exact}
        cosine = torch.cosine_similarity(said, wanted, dim=-1)
        ranks = [similarities(each).argsort().argsort().double() for each in (said, wanted)]
        order = float(torch.corrcoef(torch.stack(ranks))[0, 1])
        return {"cosine": float(cosine.mean()), "least": float(cosine.min()), "order": order}


def similarities(vectors: Tensor) -> Tensor:
    """Cosines of all pairs ``[n (n - 1) / 2]``."""
    units = torch.nn.functional.normalize(vectors, dim=-1)
    upper = torch.triu_indices(len(units), len(units), 1)
    return (units @ units.T)[upper[0], upper[1]]
