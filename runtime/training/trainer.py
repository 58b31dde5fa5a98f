"""The loop: gradients, clip, step, log, evaluate, save; it goes on where it was.

    for each step:   g = grad of the loss over the step's batches      (the engine)
                     theta = AdamW(theta, clip(g), rate * schedule(step))

Nothing here depends on what the program is, what is learned, or where it runs.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftc.graph.errors import PromiseError, UsageError, nearest

from .checkpoint import State, has_checkpoint, load_checkpoint, load_weights, save_checkpoint
from .engine import Engine
from .loader import Loader
from .log import Log
from .objectives.base import Batch, Objective
from .progress import Bar
from .schedule import Schedule

LAST, BEST = "last", "best"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; a checkpoint was written."""


@dataclass(frozen=True, slots=True)
class Options:
    """How the loop runs.

    Attributes:
        steps: of the whole run.
        learning_rate, weight_decay, beta1, beta2, epsilon: of AdamW (arXiv 1711.05101);
            weights of one axis (biases, norms) do not decay.
        schedule: of the learning rate.
        clip: largest norm of a gradient; 0 for any.
        evaluate_every, save_every, log_every: steps; 0 for never. A run that
            evaluates or saves does so after its last step too.
        patience: evaluations without a better ``metric`` before the run stops; 0 for never.
        metric: what is better; ``loss``, or a metric of the objective.
    """

    steps: int
    schedule: Schedule
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    evaluate_every: int = 0
    save_every: int = 0
    log_every: int = 10
    patience: int = 0
    metric: str = "loss"


class Trainer:
    """One run.

    Args:
        engine: computes.
        objective: for its metrics.
        data: what is learned from.
        evaluation: what is measured on, or None.
        options: of the loop.
        folder: for checkpoints, ``last`` and ``best``.

    Attributes:
        log: hears of steps and evaluations, where there is one.
        bar: shows them.
    """

    def __init__(
        self, engine: Engine, objective: Objective, data: Loader, evaluation: Loader | None,
        options: Options, folder: Path,
    ) -> None:  # fmt: skip
        self.engine, self.objective, self.options = engine, objective, options
        self.data, self.evaluation, self.folder = data, evaluation, folder
        self.log: Log | None = None
        self.bar = Bar(False, 0)
        self.state = State()
        self.optimizer = make_optimizer(engine.parameters(), options)

    def resume(self) -> bool:
        """Goes back to the last checkpoint; False where there is none."""
        if not has_checkpoint(self.folder / LAST):
            return False
        self.state = load_checkpoint(self.folder / LAST, self.engine, self.optimizer)
        return True

    def run(self) -> State:
        """Trains until the last step, or until early stopping.

        Raises:
            PromiseError: when the loss is no number any more.
            Interrupted: after an interrupt or a termination; the run can be resumed.
        """
        with _asked_to_stop() as asked:
            for batches in self.data.steps(self.state.step):
                if self.state.step >= self.options.steps or self.state.stopped:
                    break
                self._step(batches)
                self._after_step()
                if self.engine.agree(asked()):
                    self.save(LAST)
                    raise Interrupted
        if self.options.patience and self.state.best_step != self.state.step:
            load_weights(self.folder / BEST, self.engine)
        return self.state

    def first_evaluation(self) -> dict[str, float] | None:
        """What the program did before its first step; read from the log of a resumed run."""
        if self.evaluation is None:
            return None
        first = self.log.records[0] if self.log and self.log.records else None
        known = first is not None and first["step"] == 0
        if self.engine.agree(known):
            return dict(first["evaluation"]) if first is not None and known else None
        found = self.evaluate()
        self._write({"evaluation": found})
        return found

    def rehearse(self) -> tuple[float, float]:
        """The loss of the first step and the seconds it takes; nothing is changed.

        Raises:
            UsageError: for a ``metric`` that the objective has not.
        """
        if self.evaluation is not None:
            self.evaluate(1)
        batches = next(self.data.steps(0))
        begin = time.perf_counter()
        loss = math.fsum(self.engine.gradients(batches).values())
        self.optimizer.zero_grad()
        return loss, time.perf_counter() - begin

    def evaluate(self, most: int | None = None) -> dict[str, float]:
        """The loss and the metrics on the evaluation data, or on its first ``most`` batches.

        Raises:
            UsageError: for a ``metric`` that the objective has not.
        """
        assert self.evaluation is not None
        self.bar.note("evaluating")
        losses, sums = self.engine.evaluate(islice(self.evaluation.evaluation(), most))
        self.bar.note("")
        found = metrics_of(self.objective, losses, sums)
        if self.options.metric not in found:
            raise UsageError(f"there is no metric {self.options.metric!r}",
                             fix=nearest(self.options.metric, found))  # fmt: skip
        return found

    def save(self, name: str) -> None:
        """Writes a checkpoint."""
        self.bar.note("saving")
        save_checkpoint(self.folder / name, self.state, self.engine, self.optimizer)
        self.bar.note("")

    def _step(self, batches: list[Batch]) -> None:
        begin, state, options = time.perf_counter(), self.state, self.options
        rate = options.learning_rate * options.schedule.factor(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self.engine.gradients(batches)
        loss = math.fsum(parts.values())
        norm = self.engine.clip(options.clip) if options.clip else None
        if not math.isfinite(loss) or not math.isfinite(norm or 0.0):
            raise PromiseError(
                f"the loss is {loss:g} and the gradient's norm {norm} at step {state.step + 1}",
                fix="lower the learning rate, or raise --warmup",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds, tokens = time.perf_counter() - begin, sum(b.tokens for b in batches)
        state.step += 1
        state.seconds += seconds
        state.tokens += tokens * self.engine.size
        state.examples += sum(b.examples for b in batches) * self.engine.size
        speed = tokens * self.engine.size / seconds
        self.bar.step(state.step, loss, speed)
        if _due(state.step, options.log_every, options.steps) or state.step == 1:
            self._write({"loss": loss, **_several(parts), "learning_rate": rate,
                         "gradient_norm": norm, "tokens_per_second": round(speed, 1)})  # fmt: skip

    def _after_step(self) -> None:
        state, options = self.state, self.options
        if self.evaluation is not None and _due(state.step, options.evaluate_every, options.steps):
            found = self.evaluate()
            self._write({"evaluation": found})
            self._judge(found)
        if _due(state.step, options.save_every, options.steps):
            self.save(LAST)

    def _judge(self, found: Mapping[str, float]) -> None:
        """Whether this is the best so far, and whether it is time to stop."""
        state, options = self.state, self.options
        value = found[options.metric]
        if state.best is None or better(options.metric, value, state.best):
            state.best, state.best_step, state.waited = value, state.step, 0
            if options.patience:
                self.save(BEST)
        else:
            state.waited += 1
            state.stopped = 0 < options.patience <= state.waited
            if state.stopped:
                self.save(LAST)

    def _write(self, record: dict[str, Any]) -> None:
        if self.engine.main and self.log is not None:
            epoch = self.state.step / self.data.order.steps_per_epoch
            self.log.write({"step": self.state.step, "epoch": round(epoch, 4), **record})


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: Options) -> torch.optim.AdamW:
    """AdamW, in one kernel for all weights, without decay of biases and norms.

    A process of a pipeline may have no parameters that learn: its optimizer does nothing.
    """
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay},
              {"params": others, "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW([g for g in groups if g["params"]] or groups,
                             lr=options.learning_rate,
                             betas=(options.beta1, options.beta2), eps=options.epsilon,
                             fused=True)  # fmt: skip


def better(metric: str, value: float, than: float) -> bool:
    """Whether a metric improved: accuracies rise, everything else falls."""
    return value > than if metric.endswith("accuracy") else value < than


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def _several(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts of a loss that has several."""
    return {f"loss_{name}": value for name, value in parts.items()} if len(parts) > 1 else {}


def metrics_of(
    objective: Objective, losses: Mapping[str, float], sums: Mapping[str, float]
) -> dict[str, float]:
    """The loss, its parts where it has several, and the metrics of an objective."""
    whole = {"loss": math.fsum(losses.values()), **_several(losses)}
    return {**whole, **objective.metrics(losses, sums)}


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether an interrupt or a termination came; a second interrupt ends the process at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: others handle signals
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
