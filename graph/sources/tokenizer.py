"""The tokenizer that came with a model.

A program keeps the place of its tokenizer's files (``program.assets``): a folder
of transformers, a bundle, or a GGUF file, which carries its vocabulary itself.
Nothing is read before text is asked for.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftc.graph.errors import SourceError
from ftc.graph.json_file import read_object

from .gguf_header import VOCABULARY, read_header
from .quiet import first_line, quiet

if TYPE_CHECKING:
    from ftc.graph.program import Program

ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""Files of a model folder that a bundle takes along: text, no code and no weights."""

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


def tokenizer(source: Program | Path | None, kind: str | None = None) -> Any:
    """The tokenizer of a program, a model folder, a bundle or a GGUF file; None when it has none.

    Args:
        source: what has it.
        kind: the class of transformers that reads a folder's files, where it is known: without
            it transformers finds out, and imports torch for that.

    Returns:
        A tokenizer of transformers.

    Raises:
        SourceError: naming the file, when it is there and cannot be read.
    """
    place = source if source is None or isinstance(source, Path) else source.assets
    if place is None:
        return None
    if place.is_file():
        return _from_gguf(place, place.stat().st_mtime_ns)
    if not any((place / name).is_file() for name in _VOCABULARIES):
        return None
    try:
        with quiet():
            return _class(kind).from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise _damaged(place, error) from error


def _class(kind: str | None) -> Any:
    """The class called ``kind``, where that is a tokenizer's, else what finds out which."""
    import transformers

    found = getattr(transformers, kind, None) if kind else None
    tells = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
    return found if tells else transformers.AutoTokenizer


def _damaged(folder: Path, error: Exception) -> SourceError:
    """The error for a tokenizer that does not load, with the file that is to blame."""
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    try:
        for file in present:
            if file.suffix == ".json":
                read_object(file, SourceError, "copy it again from the model's source")
    except SourceError as damaged:
        return damaged
    blamed = next(file for file in present if file.name in _VOCABULARIES)
    return SourceError(
        f"transformers cannot read the tokenizer in {blamed}: {first_line(error)}",
        fix=f"copy {', '.join(file.name for file in present)} again from the model's source",
    )


@functools.lru_cache(maxsize=1)
def _from_gguf(path: Path, changed: int) -> Any:
    """The tokenizer in a GGUF file; probing and saving both ask, and it takes a second to build."""
    fields = read_header(path).fields
    if VOCABULARY not in fields:
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        with quiet():
            found: Any = PreTrainedTokenizerFast.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
    except Exception as error:
        raise SourceError(
            f"transformers cannot read the tokenizer in {path}: {error}",
            fix="put the model's tokenizer.json into a folder, and name the folder",
        ) from error
    found.init_kwargs.pop("local_files_only", None)
    length = fields.get(f"{fields.get('general.architecture')}.context_length")
    if isinstance(length, int):
        found.model_max_length = length
    return found


def copy_assets(source: Path | None, folder: Path) -> tuple[str, ...]:
    """Copies the tokenizer's and configuration's files into ``folder``; returns notes.

    A GGUF file's vocabulary becomes tokenizer.json, so that the copy needs the
    file no longer; where that cannot be done, a note says so and none is there.
    """
    if source is None:
        return ()
    if source.is_file():
        try:
            found = tokenizer(source)
        except SourceError as error:
            return (f"saved without a tokenizer: {error.what}",)
        if found is not None:
            found.backend_tokenizer.no_truncation()  # those of the last call; a GGUF file has none
            found.backend_tokenizer.no_padding()
            found.save_pretrained(folder)
        return ()
    for name in ASSETS:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    return ()


def tokenizer_class(folder: Path) -> str | None:
    """The class of transformers that reads the tokenizer in ``folder``; None where none does."""
    try:
        found = tokenizer(folder)
    except SourceError:
        return None
    return None if found is None else type(found).__name__
