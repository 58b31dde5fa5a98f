"""From a file to a table of examples: read, encoded, cached, arranged, and split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ftc.graph.errors import UsageError
from ftc.graph.words import plural
from ftc.runtime.predict import labels as model_labels

from .config import TrainConfig
from .data.encoder import IGNORED
from .data.order import generator
from .data.rows import Row, class_names, format_of, read_rows
from .data.table import Examples, Table, cached
from .objectives.base import Objective, Scene, class_output
from .objectives.labels import Classification, TokenClassification

_CHUNK = 1000
_VERSION = 3  # of what is in the cache
Say = Callable[[str], object]


@dataclass(frozen=True)
class Dataset:
    """What a run learns from and is measured on.

    Attributes:
        training: examples.
        evaluation: examples, or None.
        scene: with the names of the labels.
        notes: what was found, one sentence each.
        fingerprint: of the data.
    """

    training: Examples
    evaluation: Examples | None
    scene: Scene
    notes: tuple[str, ...]
    fingerprint: str


def load_dataset(config: TrainConfig, objective: Objective, scene: Scene, say: Say) -> Dataset:
    """Reads and encodes the data of a run.

    Raises:
        UsageError: naming file and line of a row that cannot be used; for labels that
            do not fit the program.
    """
    source = _Source(config, objective, say)
    path = Path(config.data).expanduser()
    table, scene = source.table(path, scene)
    share = _share(config.eval)
    training, evaluation = Examples.all(table), None
    if share is not None:
        training, evaluation = _split(table, share, config.seed)
    elif config.eval is not None:
        evaluation = Examples.all(source.table(Path(config.eval).expanduser(), scene)[0])
    return Dataset(training, evaluation, scene, tuple(source.notes), source.fingerprint)


def check_files(config: TrainConfig) -> None:
    """Refuses data that is not there, before anything is captured.

    Raises:
        UsageError: naming it.
    """
    named = [config.data] if _share(config.eval) is not None else [config.data, config.eval]
    for name in filter(None, named):
        if not Path(name).expanduser().exists():
            raise UsageError(f"{name} is not there", fix="name a file, or a folder of datasets")


class _Source:
    """Encodes files, each once."""

    def __init__(self, config: TrainConfig, objective: Objective, say: Say) -> None:
        self.config, self.objective, self.say = config, objective, say
        self.notes: list[str] = []
        self.fingerprint = ""

    def table(self, path: Path, scene: Scene) -> tuple[Table, Scene]:
        """The examples in a file, and the scene with the names of the labels."""
        self.say(f"reading {path}")
        form, content = format_of(path), _hash(path)
        known = scene.labels or _known_labels(self.objective, scene)
        key = [_VERSION, form, content, self.objective.spec, scene.encoder.length, known,
               scene.encoder.fingerprint, self.config.columns, self.config.limit]  # fmt: skip
        encoded, hit = cached(key, lambda: self._encode(path, scene, known))
        self.fingerprint = hashlib.sha256(f"{self.fingerprint}{content}".encode()).hexdigest()
        scene = replace(scene, labels=tuple(encoded.facts["labels"]))
        table = self.objective.arrange(encoded, scene)
        source = "from the cache" if hit else "encoded"
        self.notes.append(f"{path.name}: {plural(len(table), 'example')}, {source}")
        self._note_missing(table, scene)
        if self.objective.cuts and (full := _filling(table, scene.encoder.length)):
            self.notes.append(f"{full:,} of them fill all {scene.encoder.length} tokens of a row: "
                              "what such a text has beyond that was left out")  # fmt: skip
        return table, scene

    def _note_missing(self, table: Table, scene: Scene) -> None:
        """Says where the program tells labels that no row has."""
        column = table.columns.get("label") or table.columns.get("labels")
        width = _width(self.objective, scene)
        if width is None or column is None:
            return
        found = int((column.values.unique() != IGNORED).sum())
        if found < width:
            are = "is" if width - found == 1 else "are"
            self.notes.append(f"{width - found} of the program's {width} labels {are} in no row")

    def _encode(self, path: Path, scene: Scene, known: tuple[str, ...]) -> Table:
        columns = self.config.columns_map()
        rows = read_rows(path, columns, self.config.limit)
        column = self.objective.columns[-1]  # of the labels, where there are some
        named = class_names(path, columns.get(column, column))
        if not known and len(named) == _width(self.objective, scene):
            known = named
        labels = _labels(self.objective, rows, known, scene)
        scene = replace(scene, labels=labels)
        return Table.of(self._examples(rows, scene), {"labels": list(labels)})

    def _examples(self, rows: list[Row], scene: Scene) -> Iterator[Mapping[str, object]]:
        for start in range(0, len(rows), _CHUNK):
            self.say(f"encoding {start:,} of {len(rows):,} rows")
            yield from self.objective.encode(rows[start : start + _CHUNK], scene)


def _labels(
    objective: Objective, rows: list[Row], known: tuple[str, ...], scene: Scene
) -> tuple[str, ...]:
    """Names of the classes; numbers stand for themselves where the program has enough classes."""
    found = objective.labels(rows, known)
    width = _width(objective, scene)
    if width is None or not found or len(found) == width:
        return found
    if all(name.isdigit() and int(name) < width for name in found):
        return tuple(map(str, range(width)))
    firsts: dict[str, str] = {}
    for row in rows:
        for name in objective.labels([row], ()):
            firsts.setdefault(name, row.place)
    if len(found) == 1:
        raise UsageError(f"all rows have the label {found[0]!r}: there is nothing to tell apart",
                         where=firsts[found[0]], fix="give rows of another label too")  # fmt: skip
    task = f",task={objective.name}" * isinstance(objective, TokenClassification)
    surplus = [f"{name!r} first at {place}" for name, place in firsts.items()][width:]
    raise UsageError(
        f"the data has {len(found)} labels, the program {width}",
        where="; ".join([f"labels: {', '.join(found[:12])}", *surplus[:3]]),
        fix=f"a head with {len(found)}: --passes head{{labels={len(found)}{task}}}",
    )


def _filling(table: Table, length: int) -> int:
    """How many examples are as long as a row may be."""
    lengths = Examples.all(table).lengths()
    return 0 if lengths is None else int((lengths >= length).sum())


def _width(objective: Objective, scene: Scene) -> int | None:
    """How many classes the program tells, where the objective learns classes."""
    signature = scene.program.signature
    if isinstance(objective, Classification) and (found := class_output(signature)):
        return found[1]
    if isinstance(objective, TokenClassification):
        return next((s.shape[2] for s in signature.outputs if len(s.shape) == 3), None)  # type: ignore[return-value]
    return None


def _known_labels(objective: Objective, scene: Scene) -> tuple[str, ...]:
    """The names that the model itself has for the classes it tells, unless they say nothing."""
    named = model_labels(scene.program)
    names = tuple(named[i] for i in sorted(named))
    plain = all(name.startswith("LABEL_") for name in names)
    return () if plain or _width(objective, scene) != len(names) else names


def _share(text: str | None) -> float | None:
    """The share of the data that ``--eval`` names; None for a file."""
    try:
        found = float(text or "")
    except ValueError:
        return None
    if not 0 < found < 1:
        raise UsageError(f"eval is {text}", fix="a share between 0 and 1, or a file")
    return found


def _split(table: Table, share: float, seed: int) -> tuple[Examples, Examples]:
    """The examples without a random share, and that share, in the order of the data."""
    held = max(1, round(len(table) * share))
    if held >= len(table):
        raise UsageError(f"{plural(len(table), 'example')} cannot be split", fix="give more data")
    order = torch.randperm(len(table), generator=generator(seed))
    kept, out = order[held:].sort().values, order[:held].sort().values
    return Examples(table, kept), Examples(table, out)


def _hash(path: Path) -> str:
    """The hash of a file, or of all files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for each in files:
        try:
            with each.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UsageError(
                f"{each} cannot be read: {error.strerror}", fix="name a file"
            ) from None
    return digest.hexdigest()
