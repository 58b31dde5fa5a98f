"""``ftc train``: change what learns in a program, on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import command, force_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("program", required=False)
@click.option("--data", metavar="FILE", help="JSONL, CSV, text, Parquet, or a folder of datasets.")
@click.option("--objective", metavar="NAME", help="What to learn: mlm, clm, "
              "sequence-classification, …")  # fmt: skip
@click.option("-o", "--out", metavar="OUT", help="The bundle to write.")
@click.option("--passes", metavar="SPEC", help="Passes to run first: lora{rank=8}.")
@click.option("--task", metavar="TASK", help="What to capture for.")
@click.option("--teacher", metavar="MODEL", help="Of distillation; by default PROGRAM as it came.")
@click.option("--eval", metavar="FILE|SHARE", help="What to evaluate on: a file, or 0.1 of FILE.")
@click.option("--columns", metavar="MAP", help="text=review,label=stars.")
@click.option("--limit", type=int, metavar="N", help="Rows at most.")
@click.option(
    "--length", type=int, metavar="N", help="Tokens of a row at most; 128, or what the model takes."
)
@click.option("--batch", type=int, metavar="N", help="Rows of a batch; 16.")
@click.option("--accumulate", type=int, metavar="N", help="Batches of a step; 1.")
@click.option("--bucket", is_flag=True, default=None, help="Rows of similar length together.")
@click.option("--epochs", type=float, metavar="X", help="How often to see the data; 3.")
@click.option("--steps", type=int, metavar="N", help="Steps, instead of epochs; 0 only evaluates.")
@click.option("--learning-rate", type=float, metavar="X", help="Of AdamW; 5e-05.")
@click.option("--schedule", metavar="NAME", help="linear, cosine or constant; linear.")
@click.option(
    "--warmup", type=float, metavar="X", help="Steps in which the rate rises, or a share; 0."
)
@click.option("--weight-decay", type=float, metavar="X", help="Of AdamW; 0.")
@click.option("--clip", type=float, metavar="X", help="Largest norm of a gradient; 1.")
@click.option("--precision", metavar="NAME", help="fp32 or bf16; fp32.")
@click.option(
    "--gradient-checkpointing", is_flag=True, default=None, help="Less memory, more time."
)
@click.option("--compile", is_flag=True, default=None, help="Through torch.compile.")
@click.option("--device", metavar="NAME", help="cpu or cuda; cpu.")
@click.option("--mesh", metavar="MESH", help="Processes that torchrun started: dp=2,tp=2.")
@click.option("--pipeline", metavar="NAME", help="Schedule of stages: gpipe, 1f1b, interleaved, "
              "looped-bfs, zero-bubble, zbv or dualpipev; 1f1b.")  # fmt: skip
@click.option("--microbatches", type=int, metavar="N", help="Of a batch, in a pipeline.")
@click.option("--timeout", type=float, metavar="SECONDS", help="To wait for another process; 600.")
@click.option("--threads", type=int, metavar="N")
@click.option(
    "--evaluate-every", type=int, metavar="N", help="Steps between evaluations; an epoch."
)
@click.option("--save-every", type=int, metavar="N", help="Steps between checkpoints; an epoch.")
@click.option("--log-every", type=int, metavar="N", help="Steps between lines of the log; 10.")
@click.option(
    "--patience", type=int, metavar="N", help="Evaluations without a better metric; 0 for any."
)
@click.option("--metric", metavar="NAME", help="What patience looks at; loss.")
@click.option("--tensorboard", metavar="DIR", help="Write for TensorBoard too.")
@click.option("--seed", type=int, metavar="N", help="Of everything random; 0.")
@click.option("--trust", is_flag=True, default=None, help="Allow a .pt2 archive.")
@click.option("--config", metavar="FILE", help="The same from a TOML file; options come first.")
@click.option("--resume", is_flag=True, help="Go on with the run that was stopped, if any.")
@click.option("--dry-run", is_flag=True, help="Compute the first step, and write nothing.")
@force_option
def train(
    output: Output, config: str | None, resume: bool, dry_run: bool, force: bool, **options: Any
) -> None:
    """Train PROGRAM on data, and save the result as OUT; defaults stand behind semicolons."""
    from ftc.graph.errors import UsageError
    from ftc.runtime.training.config import TrainConfig
    from ftc.runtime.training.engines import is_main
    from ftc.runtime.training.report import render_train
    from ftc.runtime.training.run import train as run
    from ftc.runtime.training.toml_file import read_config
    from ftc.runtime.training.trainer import Interrupted

    if options["steps"] is not None and options["epochs"] is not None:
        raise UsageError("--steps and --epochs both say how long to train", fix="give one of them")
    values = read_config(Path(config)) if config else {}
    values.update({key: value for key, value in options.items() if value is not None})
    made = TrainConfig.of(values, config)
    try:
        found = run(made, resume=resume, force=force, dry_run=dry_run, show=not output.json,
                    say=output.say if is_main() else lambda _: None)  # fmt: skip
    except Interrupted:
        if is_main():
            click.echo("stopped; the same call with --resume goes on", err=True)
        raise
    if is_main():
        output.show(found, render_train)
