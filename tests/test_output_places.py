"""Where results may go: what is refused before the work, and what is left when a write fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ftc.graph.bundle import cannot_write, is_bundle, save_bundle
from ftc.graph.errors import UsageError, WriteError
from ftc.runtime import export as exporting
from ftc.runtime.export import export

from .conftest import Command
from .tiny import tiny


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return save_bundle(tiny("mlp"), tmp_path / "bundle")


@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes.txt", ".hidden"])
def test_a_users_own_file_in_a_bundle_is_not_deleted(bundle: Path, name: str) -> None:
    save_bundle(tiny("mlp"), bundle, force=True)  # without one it is replaced
    own = bundle / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("mine")
    with pytest.raises(UsageError, match="not a part of the bundle") as caught:
        save_bundle(tiny("mlp"), bundle, force=True)
    assert str(own) in caught.value.what and own.read_text() == "mine"
    own.unlink()
    save_bundle(tiny("mlp"), bundle, force=True)


def test_a_bundle_with_a_damaged_head_keeps_its_files(bundle: Path) -> None:
    """What is a part of it cannot be told any more."""
    (bundle / "ftc.json").write_text("{")
    with pytest.raises(UsageError, match="not a part"):
        save_bundle(tiny("mlp"), bundle, force=True)
    assert (bundle / "model.safetensors").exists()


@pytest.mark.parametrize(
    "call",
    [
        ("compile", "ftc.tests.small:mlp", "--passes", "int8", "-o", "j.txt/x"),
        ("compile", "no/such/model", "--passes", "int8", "-o", "j.txt/deep/x"),
        ("export", "no/such/model", "-o", "j.txt/m.onnx"),
        ("export", "no/such/model", "-o", "j.txt/deep/m.onnx"),
    ],
)
def test_a_place_within_a_file_is_refused_before_the_work(
    call: tuple[str, ...], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("j.txt").write_text("mine")
    ran = command(*call)
    assert ran.status == 2 and "j.txt is a file" in ran.err and "space" not in ran.err
    assert Path("j.txt").read_text() == "mine" and _names(tmp_path) == ["j.txt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EFBIG, "ulimit"),
        (errno.EACCES, "may write to"),
        (errno.EROFS, "may write to"),
        (errno.ENOENT, "another place"),
    ],
)
def test_the_fix_is_for_what_went_wrong(number: int, words: str) -> None:
    found = cannot_write(OSError(number, os.strerror(number), "/some/file"), Path("/some"))
    assert "/some/file" in found.what and words in (found.fix or "")
    assert ("space" in (found.fix or "")) == (number == errno.ENOSPC) and found.exit_code == 1


def _full(model: Any, path: Path) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("out", ["m.onnx", "new/deep/m.onnx", "there"])
def test_an_export_to_a_full_disk_leaves_nothing(
    out: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    before = _names(tmp_path)
    monkeypatch.setattr(exporting, "save_onnx", _full)
    with pytest.raises(WriteError, match=r"No space left.*\n.*m.*\.onnx") as caught:
        export(str(bundle), tmp_path / out)
    assert "free some space" in str(caught.value) and _names(tmp_path) == before


def test_an_export_that_fails_keeps_the_old_file(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    export(str(bundle), target)
    before = target.read_bytes()
    monkeypatch.setattr(exporting, "save_onnx", _full)
    with pytest.raises(WriteError):
        export(str(bundle), target, force=True)
    assert target.read_bytes() == before and _names(tmp_path)[-1] == "m.onnx"


def test_an_export_does_not_change_a_bundle(bundle: Path) -> None:
    with pytest.raises(UsageError, match="is a bundle"):
        export(str(bundle), bundle, force=True)
    assert is_bundle(bundle) and not (bundle / "model.onnx").exists()


def test_an_export_says_what_its_error_is(bundle: Path, tmp_path: Path, command: Command) -> None:
    ran = command("export", bundle, "-o", tmp_path / "m.onnx")
    assert ran.status == 0 and "which is rounding" in " ".join(ran.out.split())
