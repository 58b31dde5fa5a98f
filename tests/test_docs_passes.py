"""docs/writing_passes.md is true: its pass, its test, its entry point and its script all run."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftc.graph.errors import FtcError
from ftc.passes import registry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "writing_passes.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the page's files in it, installed as the page's entry point."""
    for language, code in BLOCKS:
        if language == "python":
            name = re.match(r"# (\S+\.py)\n", code)
            assert name, "a python block starts with the name of its file"
            (tmp_path / name[1]).write_text(code, encoding="utf-8")
        if language == "toml":
            header, *points = code.strip().splitlines()
            group = re.fullmatch(r'\[project\.entry-points\."(.+)"\]', header)
            assert group
            info = tmp_path / "documented-0.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Name: documented\nVersion: 0.1\n")
            lines = [f"[{group[1]}]", *(point.replace('"', "") for point in points)]
            (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def test_the_pass_is_found_by_its_entry_point(package):
    assert "fold-scales" in registry.names()
    described = registry.describe(registry.get("fold-scales"))
    assert described.summary == "Fold consecutive multiplications by constants into one."
    assert [option.name for option in described.options] == ["largest"]


def test_the_page_s_tests_pass(package):
    module = importlib.import_module("test_fold_scales")
    tests = [v for k, v in vars(module).items() if k.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        assert isinstance(test, types.FunctionType)
        test()


def test_the_page_s_script_runs(package, capsys):
    importlib.import_module("use_it")
    printed = capsys.readouterr().out
    assert "fold-scales{largest=10.0} 0" in printed
    assert "int8{min_size=0} 1" in printed


def test_the_pass_breaks_its_promise_when_it_is_wrong(package):
    """What the page says of a wrong pass: the error names it and the node."""
    wrong = (package / "fold_scales.py").read_text().replace("inner.args[1] * outer", "2 * outer")
    (package / "wrong_scales.py").write_text(wrong)
    module = importlib.import_module("wrong_scales")
    program = importlib.import_module("test_fold_scales")
    captured = program.capture_module(program.Scaled(), program.torch.randn(4, 8))
    with pytest.raises(FtcError, match="fold-scales promises exact results") as caught:
        module.FoldScales()(captured)
    assert "made by fold-scales" in caught.value.where


def test_a_broken_package_is_named(package):
    (package / "fold_scales.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(FtcError, match="cannot be loaded") as caught:
        registry.get("fold-scales")
    assert "fold_scales:FoldScales" in caught.value.where


def test_a_broken_package_stops_nobody_else(package, caplog):
    (package / "fold_scales.py").write_text("raise ImportError('half installed')\n")
    assert "cleanup" in [cls.name for cls in registry.loadable()]
    assert "half installed" in caplog.text
    with pytest.raises(FtcError, match="half installed"):
        registry.get("fold-scales")
