"""The command line on small models: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ftc.cli import ftc
from ftc.passes import registry
from ftc.passes.outline import outlines
from ftc.runtime import commands

from .cli_bundles import PASSES, bundle, masked, mistake  # noqa: F401
from .conftest import Command, Ran
from .small import decoder


def test_help_answers_at_once() -> None:
    """Nothing heavy is imported for it."""
    code = "\n".join((
        "import sys; sys.argv = ['ftc', '--help']",
        "from ftc import cli",
        "try: cli.main()",
        "except SystemExit: pass",
        "assert not {'torch', 'rich.console', 'transformers'} & set(sys.modules)",
    ))  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 2  # 0.1 s where nothing else runs
    listed = [
        line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line
    ]
    assert listed == list(commands.NAMES)


@pytest.mark.parametrize("module", ["ftc", "ftc.cli"])
def test_python_runs_the_package_as_the_command(module: str) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True)

    right, wrong = run("passes", "int8"), run("pases")
    assert right.returncode == 0 and "int8" in right.stdout
    assert wrong.returncode == 2 and "did you mean passes" in wrong.stderr


def test_every_file_of_commands_is_a_command() -> None:
    files = {p.stem for p in Path(commands.__file__).parent.glob("*.py")}
    assert files - {"__init__", "options"} == set(commands.NAMES)
    for name in commands.NAMES:
        assert ftc.get_command(None, name).name == name  # type: ignore[arg-type, union-attr]


def test_compile_reports_every_step(bundle: Path, masked: Path, command: Command) -> None:
    report = json.loads((bundle / "report.json").read_text())
    names = [step["name"] for step in report["steps"]]
    assert names[0] == "original" and names[-1] == "onnx" and names[1] == "cleanup"
    assert names[-2] == "int8{min_size=16}" and "lowrank{ratio=0.5}" in names
    original, result = report["steps"][0], report["steps"][-2]
    assert result["bytes"] < original["bytes"] / 2
    assert result["parameters"] < original["parameters"]
    assert report["steps"][-1]["bytes"] == (bundle / "model.onnx").stat().st_size
    assert 0 < report["total"]["relative"] < 10
    assert all(each["speedup"] > 0 and each["sizes"] for each in report["latencies"])
    assert "documentation" in report["total"]["inputs"]


def test_compile_prints_one_table(masked: Path, tmp_path: Path, command: Command) -> None:
    ran = command("compile", masked, "--passes", "int8", "-o", tmp_path / "out", "--timing")
    assert ran.status == 0 and not ran.err
    for word in ("original", "canonicalize", "int8", "onnx", "latency", "capture", "next: ftc run"):
        assert word in ran.out
    commands = [line for line in ran.out.splitlines() if ": ftc " in line]  # to copy: never wrapped
    assert max(len(line) for line in ran.out.splitlines() if line not in commands) <= 120


def test_the_report_says_what_is_on_disk_and_what_to_do_next(
    masked: Path, bundle: Path, tmp_path: Path, command: Command
) -> None:
    shipped = json.loads((bundle / "report.json").read_text())["shipped"]
    assert shipped["source_bytes"] == (masked / "model.safetensors").stat().st_size
    for name, size in shipped["files"].items():
        assert (bundle / name).stat().st_size == size
    assert {"model.onnx", "model.safetensors", "tokenizer.json"} <= set(shipped["files"])
    for source in (masked, decoder(tmp_path / "decoder"), "ftc.tests.small:mlp"):
        ran = command("compile", source, "--passes", "cleanup", "-o", tmp_path / "out", "--force")
        assert ("on disk: source" in ran.out) == isinstance(source, Path)
        told = shlex.split(ran.out.partition("next: ftc ")[2].splitlines()[0])
        if "FILE.npz" in told:  # it says what the file has to hold
            assert "input float32 [batch, 64]" in ran.out
            np.savez(tmp_path / "x.npz", input=np.ones((2, 64), np.float32))
            told[told.index("FILE.npz")] = str(tmp_path / "x.npz")
        assert command(*told).status == 0, told


def test_a_model_without_a_tokenizer_is_asked_with_tensors(
    tmp_path: Path, command: Command
) -> None:
    model = decoder(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    ran = command("compile", model, "--passes", "cleanup", "-o", tmp_path / "out")
    assert "--input FILE.npz" in ran.out and "--text" not in ran.out
    assert "input_ids int64 [batch, sequence]" in ran.out


def test_a_report_is_loud_where_the_model_was_changed(
    masked: Path, tmp_path: Path, command: Command
) -> None:
    for passes, loud in (("lowrank{ratio=0.3}", True), ("int8", False)):
        ran = command("compile", masked, "--passes", passes, "-o", tmp_path / "out", "--force")
        assert ("this changed the model" in ran.out) == loud
        assert not loud or "ftc eval" in ran.out
        assert "0.00 us" not in ran.out
        assert not any(line.endswith(" ") for line in ran.out.splitlines())


def test_dry_run_writes_nothing(masked: Path, tmp_path: Path, command: Command) -> None:
    ran = command(
        "compile", masked, "--passes", "int8", "-o", tmp_path / "out", "--dry-run", "--json"
    )
    assert ran.data["pipeline"].startswith("cleanup,canonicalize") and ran.data["dry_run"]
    assert not list(tmp_path.iterdir())


def test_print_ir_goes_to_stderr(tmp_path: Path, command: Command) -> None:
    ran = command("compile", "ftc.tests.small:mlp", "--passes", "cleanup", "-o", tmp_path / "out",
                  "--print-ir-after", "cleanup", "--json")  # fmt: skip
    assert "aten.linear" in ran.err and ran.data["task"] == "module"


def test_max_drift_is_a_broken_budget(masked: Path, tmp_path: Path, command: Command) -> None:
    ran = command("compile", masked, "--passes", PASSES, "-o", tmp_path / "out",
                  "--max-drift", "1e-9")  # fmt: skip
    mistake(ran, "BudgetError", "budget", status=1)
    assert not (tmp_path / "out").exists()


def test_calibration_from_file_text_and_tensors(
    masked: Path, tmp_path: Path, command: Command
) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("the cat sits on the mat .\n\nthe dog runs in the house .\n")
    for number, calib in enumerate((prose, "the sky is blue")):
        out = tmp_path / str(number)
        ran = command("compile", masked, "--passes", "int8", "-o", out, "--calib", calib, "--json")
        assert ran.status == 0, ran.err
        words = "prose.txt" if calib is prose else "the given text"
        assert words in ran.data["total"]["inputs"]
    tensors = tmp_path / "x.npz"
    np.savez(tensors, input=np.ones((2, 64), np.float32))
    ran = command("compile", "ftc.tests.small:mlp", "--passes", "int8", "-o", tmp_path / "m",
                  "--calib", tensors, "--json")  # fmt: skip
    assert "x.npz" in ran.data["total"]["inputs"]


def test_an_existing_folder_is_refused_before_work(
    bundle: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    mistake(command("compile", "no/such/model", "--passes", "int8", "-o", bundle), "--force")
    ran = command("compile", "no/such/model", "--passes", "int8", "-o", tmp_path, "--force")
    mistake(ran, "not a bundle")
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complie"], ["compile"]),
        (["compile"], ["MODEL"]),
        (["compile", "x", "--passes", "int8"], ["-o"]),
        (["compile", "x", "--passes", "int9", "-o", "OUT"], ["did you mean int8"]),
        (["compile", "x", "--passes", "int8{actvation=row}", "-o", "OUT"], ["activation"]),
        (["compile", "x", "--passes", "int8", "-o", "OUT", "--target", "vnmi"], ["portable"]),
        (["compile", "no/such/folder", "--passes", "int8", "-o", "OUT"], ["no/such/folder"]),
        (["inspect", "/no/such"], ["/no/such"]),
        (["run", "/no/such", "--text", "hello"], ["/no/such"]),
        (["run", "/no/such"], ["--text"]),
        (["eval", "x", "--data", "d", "--metric", "perplexty"], ["perplexity"]),
        (["eval", "x", "--data", "d", "--metric", "cosine"], ["--against"]),
        (["export", "/no/such", "-o", "OUT.onnx"], ["/no/such"]),
        (["passes", "lowrnk"], ["lowrank"]),
        (["bench", "/no/such"], ["/no/such"]),
    ],
)
def test_mistakes(
    arguments: list[str], words: list[str], tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    mistake(command(*arguments), *words)
    assert not list(tmp_path.iterdir())


def test_a_mistake_as_json(command: Command) -> None:
    ran = command("passes", "lowrnk", "--json")
    assert ran.status == 2 and ran.data["error"]["kind"] == "UsageError" and not ran.err
    assert "lowrank" in ran.data["error"]["fix"]


def test_a_bug_says_so(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda name: 1 / 0)
    ran = command("passes", "int8")
    assert ran.status == 70 and "bug in ftc" in ran.err and "--debug" in ran.err
    assert "Traceback" not in ran.err
    with pytest.raises(ZeroDivisionError):
        command("passes", "int8", "--debug")


def test_an_interrupt_ends_with_a_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    def within_an_import(name: str) -> None:
        try:
            interrupted(name)
        except KeyboardInterrupt as stop:
            raise ImportError("initialization failed") from stop

    for each in (interrupted, within_an_import):
        monkeypatch.setattr(registry, "get", each)
        assert command("passes", "int8") == Ran(130, "", "interrupted; no result was written\n")


def test_a_closed_pipe_ends_quietly() -> None:
    code = "import sys; from ftc import cli; sys.argv = ['ftc', 'passes', '--json']; cli.main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE,
                          text=True)  # fmt: skip
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_the_list_of_passes_imports_none_of_them() -> None:
    code = (
        "import sys; sys.argv = ['ftc', 'passes']\nfrom ftc import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'ftc.passes.base'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "COLUMNS": "200"})  # fmt: skip
    shown = [line.split()[:2] for line in done.stdout.splitlines()[1:] if line.strip()]
    known = [registry.describe(registry.get(name)) for name in registry.names()]
    assert shown[: len(known)] == [[each.name, each.effect] for each in known]
    assert [(o.name, o.effect, o.summary) for o in outlines()] == [
        (each.name, each.effect, each.summary) for each in known
    ]


def test_passes_are_the_registrys(command: Command) -> None:
    listed = command("passes", "--json").data
    assert [each["name"] for each in listed] == list(registry.names())
    for name in registry.names():
        shown = command("passes", name).out
        for option in registry.describe(registry.get(name)).options:
            assert option.name in shown
            assert option.help, f"{name}: {option.name} has no help"
