"""ftc, the fine-tune compiler: capture a model, rewrite it, prove it, ship it.

>>> import ftc                                               # doctest: +SKIP
>>> program = ftc.capture("path/to/model")                   # doctest: +SKIP
>>> result = ftc.Pipeline.parse("lowrank,int8").run(program) # doctest: +SKIP
>>> ftc.compile_model("path/to/model", "lowrank,int8", "out")  # doctest: +SKIP

Names are imported when they are first used (PEP 562): ``import ftc`` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph.lazy import importing

if TYPE_CHECKING:
    from .graph.bundle import load_bundle, save_bundle
    from .graph.cost import cost
    from .graph.errors import FtcError
    from .graph.printer import diff, print_graph
    from .graph.program import Drift, PassRecord, Program
    from .graph.rewriter import Rewriter
    from .graph.select import select
    from .graph.signature import Signature
    from .graph.sources import capture
    from .graph.verify import verify
    from .passes.base import Context, Effect, Pass, PassResult
    from .passes.pipeline import Observer, Pipeline
    from .passes.registry import register
    from .runtime.compile import compile_model
    from .runtime.lower import lower, save_onnx
    from .runtime.session import OnnxSession

_HOMES = {
    "graph.bundle": ("load_bundle", "save_bundle"),
    "graph.cost": ("cost",),
    "graph.errors": ("FtcError",),
    "graph.printer": ("diff", "print_graph"),
    "graph.program": ("Drift", "PassRecord", "Program"),
    "graph.rewriter": ("Rewriter",),
    "graph.select": ("select",),
    "graph.signature": ("Signature",),
    "graph.sources": ("capture",),
    "graph.verify": ("verify",),
    "passes.base": ("Context", "Effect", "Pass", "PassResult"),
    "passes.pipeline": ("Observer", "Pipeline"),
    "passes.registry": ("register",),
    "runtime.compile": ("compile_model",),
    "runtime.lower": ("lower", "save_onnx"),
    "runtime.session": ("OnnxSession",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order in which they are needed)
    "capture", "Program", "Signature", "PassRecord", "Drift", "FtcError",
    "Pass", "PassResult", "Effect", "Context", "Rewriter", "register",
    "Pipeline", "Observer", "compile_model",
    "lower", "save_onnx", "OnnxSession", "load_bundle", "save_bundle",
    "select", "cost", "verify", "print_graph", "diff",
]  # fmt: skip


__getattr__ = importing(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
