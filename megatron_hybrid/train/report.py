"""What a run leaves to look at, written by ONE rank (the logging rank; Megatron's is the last) from reduced numbers.

    config.json                resolved settings, package versions, git revision, command line
    metrics.jsonl              one line per step (kind "step") and per held-out evaluation (kind "eval")
    samples.jsonl, samples.md  responses with reward and KL: all of them, and the newest to read
    summary.json, summary.md   held-out numbers before and after
    plots/                     drawn by `train/plots.py` at the end

Beside them lie failed_samples_<replica>.jsonl and reward_output_<rank>.log, which other ranks write.
In: floats by name (`metrics.MEANINGS`), Megatron's own TensorBoard and wandb writers. Also one plain progress line a
step: no cursor movement, so it reads the same in a terminal and in a Slurm log. Whatever cannot be written once the run
is under way is said once, counted, and no reason to end it (`outlets.py`). Not here: reductions, collectives.
"""

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_hybrid.train import journal, samples, summary
from megatron_hybrid.train.origin import git_revision, versions
from megatron_hybrid.train.outlets import JournalOutlet, Outlet
from megatron_hybrid.train.samples import Sample

MEDIAN_WINDOW = 20
"""Steps behind the time left: the median forgets slow first steps. Evaluations and checkpoints come on top."""

PLAIN_WIDTH = 120
"""Columns of tables where there is no terminal to ask."""


class RunReport:
    """The run folder and the writers of one run. Make it on one rank only: two would write the same files.

    total_steps  optimizer steps of the whole run, for the progress line
    tensorboard  torch.utils.tensorboard.SummaryWriter, or None
    wandb        the wandb module after init, or a run: anything with log(dict, step); or None
    console      False: files and writers only
    start_step   steps done before (a resume): later lines of the journals are moved aside, they will come again
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        tensorboard: Any = None,
        wandb: Any = None,
        console: bool = True,
        start_step: int = 0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._total_steps = total_steps
        self._start_step = start_step
        self._tensorboard = tensorboard
        self._wandb = wandb
        self._metrics = JournalOutlet(self.run_dir / "metrics.jsonl")
        self._samples = JournalOutlet(self.run_dir / "samples.jsonl")
        self._infinite_kl = JournalOutlet(self.run_dir / "infinite_kl.jsonl")
        self._pages = Outlet("the run folder", "config.json, samples.md, summary.* and plots may be missing or old")
        self._output = Outlet("standard output", "the progress lines are in metrics.jsonl alone")
        self._to_tensorboard = Outlet("TensorBoard", "its curves have a gap, metrics.jsonl has the numbers")
        self._to_wandb = Outlet("wandb", "its curves have a gap, metrics.jsonl has the numbers")
        self._guards = ExitStack()
        self._guard_writers()
        self._console = Console(quiet=not console, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        self._step_times_s: deque[float] = deque(maxlen=MEDIAN_WINDOW)
        self._last_end_s: float | None = None
        self._last_samples: Table | None = None
        self._set_aside()

    def _set_aside(self) -> None:
        """Moves away what an earlier start has left of later steps, other ranks' files too: they write later."""
        # A fresh run keeps nothing of an earlier one in this folder, not even what it held before its first step.
        last = self._start_step if self._start_step > 0 else -1
        for outlet in (self._metrics, self._samples, self._infinite_kl):
            dropped = journal.rewind(outlet.path, last)
            if dropped:
                self._say(
                    f"{outlet.name}: {dropped} lines after step {self._start_step} moved aside, to be produced again"
                )
        for file in self.run_dir.glob("failed_samples_*[0-9].jsonl"):
            Outlet(file.name, "what an earlier start left stays in it").write(journal.rewind, file, last)
        for file in self.run_dir.glob("reward_output_*[0-9].log") if last < 0 else ():
            Outlet(file.name, "what an earlier run left stays in it").write(
                file.replace, file.with_suffix(".dropped.log")
            )

    def _guard_writers(self) -> None:
        """Megatron, too, writes to them at every step."""
        for outlet, writer, names in (
            (self._to_tensorboard, self._tensorboard, _public_methods(self._tensorboard)),
            (self._to_wandb, self._wandb, ("log", "finish")),
        ):
            if writer is not None:
                self._guards.enter_context(outlet.guards(writer, names))

    def guard_wandb_caller(self, function: Callable[..., Any]) -> None:
        """A function of Megatron's that talks to wandb is no reason to end the run either; until `close`."""
        self._guards.enter_context(self._to_wandb.guards(sys.modules[function.__module__], [function.__name__]))

    def close(self) -> None:
        """Says what could not be written, and gives the writers back as they were."""
        for outlet in (
            self._metrics,
            self._samples,
            self._infinite_kl,
            self._pages,
            self._output,
            self._to_tensorboard,
            self._to_wandb,
        ):
            if outlet.summary is not None:
                self._say(outlet.summary)
        self._guards.close()

    def config(self, settings: Mapping[str, Any]) -> None:
        """Writes config.json; that of an earlier attempt stays as config.before_step_<start_step>.json."""
        self._pages.write(self._write_config, settings)

    def _write_config(self, settings: Mapping[str, Any]) -> None:
        path = self.run_dir / "config.json"
        if path.exists() and self._start_step > 0:
            path.replace(self.run_dir / f"config.before_step_{self._start_step}.json")
        about = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "start_step": self._start_step,
            "total_steps": self._total_steps,
            "command": [sys.executable, *sys.argv],
            "git": git_revision(),
            "versions": versions(),
        }
        journal.write_json(path, {"config": dict(settings), **about})

    def parts(self, parts: Mapping[str, str]) -> None:
        """Says whose layers and optimizer compute, and adds them to config.json."""
        for part, classes in parts.items():
            self._say(f"{part}: {classes}")
        self._pages.write(self._add_to_config, {"parts": dict(parts)})

    def _add_to_config(self, more: Mapping[str, Any]) -> None:
        path = self.run_dir / "config.json"
        if path.exists():
            journal.write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **more})

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records one optimizer step, the `step`-th (from 1), and prints its progress line."""
        self._record(step, "step", metrics)
        now_s = time.monotonic()
        took_s = metrics.get("timing_s/step", None if self._last_end_s is None else now_s - self._last_end_s)
        self._last_end_s = now_s
        if took_s is not None:
            self._step_times_s.append(took_s)
        left_s = statistics.median(self._step_times_s) * (self._total_steps - step) if self._step_times_s else None
        self._say(progress_line(step, self._total_steps, metrics, left_s))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a held-out evaluation after `step` optimizer steps (0: before training); names start with val/."""
        self._record(step, "eval", metrics)
        shown = "  ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in metrics.items())
        self._say(f"held-out after step {step}  {shown}")

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Keeps the rows in samples.jsonl and makes them samples.md; `finish` shows the first few of the last ones."""
        self._samples.append(*({"step": step, **row.as_record()} for row in rows))
        page = samples.markdown(step, rows)
        self._pages.write(journal.write_text, self.run_dir / "samples.md", page)
        if self._tensorboard is not None:
            self._tensorboard.add_text("samples", page, step)
        self._last_samples = samples.table(step, rows)

    def infinite_kl(self, step: int, records: Sequence[Mapping[str, Any]]) -> Path:
        """Keeps tokens of infinite KL, as `InfiniteKl` names them; returns where."""
        self._infinite_kl.append(*({"step": step, **record} for record in records))
        return self._infinite_kl.path

    def finish(self, before: Mapping[str, float] | None = None, after: Mapping[str, float] | None = None) -> None:
        """Shows and saves held-out numbers before and after, then draws the plots.

        before, after  as given to `evaluation`; None: the first and the last one in metrics.jsonl, so that a resumed
                       run compares with its real beginning
        """
        held_out = [r for r in self._metrics.read() if r["kind"] == "eval"]
        before = before if before is not None else _numbers(held_out[0]) if held_out else {}
        after = after if after is not None else _numbers(held_out[-1]) if held_out else {}
        if self._last_samples is not None:
            self._output.write(self._console.print, self._last_samples)
        changes = summary.compare(before, after)
        if changes:
            records = {c.name: c.as_record() for c in changes}
            self._pages.write(journal.write_json, self.run_dir / "summary.json", records)
            self._pages.write(journal.write_text, self.run_dir / "summary.md", summary.markdown(changes))
            self._output.write(self._console.print, summary.table(changes))
        self._draw()

    def _draw(self) -> None:
        try:
            from megatron_hybrid.train import plots
        except ImportError as error:
            self._say(f"no plots drawn ({error}): install matplotlib, then python tools/plot_run.py {self.run_dir}")
            return
        drawn = self._pages.write(plots.draw, self.run_dir)
        if drawn:
            self._say(f"{len(drawn)} figures in {drawn[0].parent}, all at a glance in {drawn[-1].name}")

    def _record(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **metrics}
        self._metrics.append(line)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step)

    def _say(self, line: str) -> None:
        # soft_wrap: a line is never broken, whatever the width; markup off: names may hold brackets.
        self._output.write(self._console.print, line, markup=False, highlight=False, soft_wrap=True)


def progress_line(step: int, total_steps: int, metrics: Mapping[str, float], left_s: float | None) -> str:
    """One step in under 160 characters; a number that the step did not report is left out."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for text, name, spec in (
        ("reward {}", "critic/score/mean", ".3f"),
        ("kl {} nats/tok", "actor/kl_loss", ".3g"),
        ("entropy {}", "actor/entropy", ".3f"),
        ("length {}", "response_length/mean", ".1f"),
        ("{} tok/s", "perf/throughput", ",.0f"),
        ("grad {}", "actor/grad_norm", ".3g"),
    ):
        if name in metrics:
            value = metrics[name]
            parts.append(text.format(format(value, spec if abs(value) < 1e6 else ".2e")))
    if left_s is not None:
        parts.append(f"left {hours(left_s)}")
    return "  ".join(parts)


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}"


def _public_methods(writer: Any) -> list[str]:
    return [name for name in dir(type(writer)) if not name.startswith("_") and callable(getattr(writer, name))]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name not in ("step", "kind", "time")}
