"""Low-rank adapters in the form that PEFT keeps them in.

The names of a weight's modules are the model's own, and so are PEFT's: the adapter of
``a.b.weight`` is ``base_model.model.a.b.lora_A.weight`` and ``…lora_B.weight``, and a
module that was trained whole has its own names behind the same prefix. Ranks and
alphas that differ from the most common ones are in ``rank_pattern`` and
``alpha_pattern``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from torch import Tensor

from ftc.graph.adapters import LORA_A, LORA_B, LoraAdapter, lora_adapters
from ftc.graph.errors import PreconditionError, UsageError, nearest
from ftc.graph.program import Program
from ftc.graph.provenance import provenance
from ftc.graph.structure import find_structure
from ftc.graph.words import listed
from ftc.passes.canonicalize import Canonicalize
from ftc.passes.lora import Lora
from ftc.passes.lora_sites import LoraSite, lora_sites
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass

from .files import makers, put
from .peft_whole import BIAS, head_to_peft, lone_biases, whole_from_peft, whole_to_peft
from .selecting import selector

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_REFUSED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication",
            "trainable_token_indices", "target_parameters", "alora_invocation_tokens")  # fmt: skip
_KEEPS_BASE = (True, False, None, "gaussian", "eva")  # what `init_lora_weights` leaves W as it is


def to_peft(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors for the low-rank adapters of ``program``.

    Raises:
        UsageError: for what PEFT's format has no place for.
    """
    adapters = {each.weight: each for each in lora_adapters(program)}
    modules = {weight: _module(program, each) for weight, each in adapters.items()}
    tensors: dict[str, Tensor] = {}
    for weight, each in adapters.items():
        for name, suffix in ((each.a, _A), (each.b, _B)):
            tensors[PREFIX + modules[weight] + suffix] = program.tensor(name).detach()
    ranks = {modules[w]: program.tensor(each.a).shape[0] for w, each in adapters.items()}
    alphas = {modules[w]: _whole(e.scale * ranks[modules[w]]) for w, e in adapters.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    biases = lone_biases(program)
    kind, stored = _biases(program, biases, set(ranks))
    tensors.update(stored)
    whole = head_to_peft(program) | whole_to_peft(program, without=biases)
    if both := sorted({name.rpartition(".")[0] for name in whole} & ranks.keys()):
        raise UsageError(
            f"PEFT trains a module whole or adapts it, and here both are done to {listed(both)}",
            fix="leave its weight out of `also`, or save it in ftc's own format: save_adapters",
        )
    tensors.update({PREFIX + name: tensor for name, tensor in whole.items()})
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _commonest(each.dropout for each in adapters.values()),
        "target_modules": sorted(ranks),
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "bias": kind,
        "init_lora_weights": "pissa" if _is_pissa(program) else True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }, tensors


def _module(program: Program, adapter: LoraAdapter) -> str:
    """The module of an adapted weight; of tied ones, that whose product it is."""
    own = f"{provenance(adapter.base).module}.weight"
    name = own if own in program.with_ties({adapter.weight}) else adapter.weight
    if not name.endswith(".weight"):
        raise UsageError(
            f"PEFT adapts modules, and {name} is a parameter beside others",
            fix="save it in ftc's own format: save_adapters",
        )
    return name.removesuffix(".weight")


def _biases(program: Program, names: Set[str], adapted: Set[str]) -> tuple[str, dict[str, Tensor]]:
    """Trained biases as PEFT has them: which of all it trains, and tensors by its names."""
    inside = {name for name in names if name.removesuffix(BIAS) in adapted}
    tensors = {}
    for name in sorted(names):
        module = name.removesuffix(BIAS)
        own = f"{module}.base_layer{BIAS}" if name in inside else name
        tensors[PREFIX + own] = program.tensor(name).detach()
    return ("all" if names - inside else "lora_only" if names else "none"), tensors


def _is_pissa(program: Program) -> bool:
    names = {each.a: program.tensor(each.a) for each in lora_adapters(program)}
    found = {
        given.init for spec in makers(program, names) if isinstance(given := parse_pass(spec), Lora)
    }
    if len(found) > 1:
        raise UsageError(
            "some of the adapters began as parts of their weights (pissa), and others did not",
            fix="save them in ftc's own format: save_adapters",
        )
    return found == {"pissa"}


def from_peft(
    program: Program, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Program:
    """``program`` with the adapters that PEFT's ``config`` and ``tensors`` describe.

    Raises:
        UsageError: for a variant of LoRA that ftc has not.
        PreconditionError: for modules that the program has not.
    """
    _check(config)
    pairs, whole = _split(tensors)
    if "canonical" not in program.facts:
        program = Canonicalize()(program).program
    sites, _ = lora_sites(find_structure(program))
    known = {module: site for site in sites for module in _modules(program, site)}
    rename = _renaming(pairs, known)
    wanted: dict[tuple[int, float], list[LoraSite]] = {}
    values: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        site, rank = known[rename(module)], a.shape[0]
        wanted.setdefault((rank, _alpha(config, module, rank)), []).append(site)
        values |= {site.weight + LORA_A: a, site.weight + LORA_B: b}
    init = "pissa" if str(config.get("init_lora_weights")).startswith("pissa") else "default"
    dropout = float(config.get("lora_dropout") or 0.0)
    passes = tuple(
        Lora(rank, alpha, dropout, selector(program, sites, chosen), init, "none")
        for (rank, alpha), chosen in wanted.items()
    )
    values |= whole_from_peft(program, {rename(name): tensor for name, tensor in whole.items()})
    return put(Pipeline(passes).run(program).program, values)


def _check(config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights", True)
    odd = [key for key in _REFUSED if config.get(key)]
    if init not in _KEEPS_BASE and not str(init).startswith("pissa"):
        odd.append(f"init_lora_weights={init}")
    if odd:
        raise UsageError(
            f"the adapter uses {' and '.join(odd)}, which ftc has not",
            where="adapter_config.json",
            fix="train it without, or merge it with PEFT and capture the model",
        )


def _split(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """``(A, B)`` by module, and what was trained whole by parameter."""
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    firsts = [name.removesuffix(_A) for name in plain if name.endswith(_A)]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module in firsts:
        try:
            pairs[module] = plain.pop(module + _A), plain.pop(module + _B)
        except KeyError:
            raise PreconditionError(
                f"the adapter of {module} has no {_B[1:]}", fix="save it with PEFT again"
            ) from None
    if strange := sorted(name for name in plain if "lora_" in name):
        raise UsageError(
            f"{strange[0]} is not the adapter of a product", fix="train it on linear modules"
        )
    return pairs, {name.replace(".base_layer.", "."): t for name, t in plain.items()}


def _modules(program: Program, site: LoraSite) -> Iterable[str]:
    """The names that PEFT may call a site by."""
    return (n.removesuffix(".weight") for n in program.with_ties({site.weight}))


def _renaming(modules: Iterable[str], known: Iterable[str]) -> Callable[[str], str]:
    """How PEFT's names become the program's: as they are, or under another first module.

    The same body is ``encoder.…`` captured for its features and ``bert.encoder.…`` below
    a head: one prefix more or less is made good, if it is the same for all.
    """
    modules, known = set(modules), set(known)
    firsts = {name.split(".")[0] + "." for name in modules | known}
    if modules <= known:
        return lambda name: name
    for first in sorted(firsts):
        if all(module.removeprefix(first) in known for module in modules):
            return lambda name: name.removeprefix(first)
        if all(first + module in known for module in modules):
            return lambda name: first + name
    missing = min(modules - known)
    raise PreconditionError(
        f"the adapter is for {missing}, and the program has no such product",
        where=f"{len(modules - known)} of {len(modules)} modules",
        fix=f"load it on the model it was trained on; {nearest(missing, known)}",
    )


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha as ftc means it, ``scale * rank``; patterns are PEFT's: the ends of names."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)),
        config.get("lora_alpha", 8),
    )
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(number: float) -> float | int:
    """An integer where it is one to rounding: PEFT's own files have integers."""
    nearest_integer = round(number)
    return nearest_integer if math.isclose(number, nearest_integer, rel_tol=1e-9) else number
