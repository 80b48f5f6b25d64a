"""Runs of two ranks, killed at random moments and started again: nothing may be lost but time.

    python -m tests.faults.kills --runs 30 --seed 0 [--folder FOLDER]

A run keeps all that a run can: a copy of the student that follows it, the mean of earlier rewards, a collection that
several steps learn from, held-out evaluations. SIGKILL for one rank or for both, a random time after one of the stages
has begun; then the same command again, which is killed too: three times, and the fourth ends. Compared with a run that
nobody killed, bit for bit: every tensor of the last checkpoint, optimizer included, and of the copy; all lines of
metrics.jsonl (without clock and timings) and samples.jsonl. The table goes to FOLDER/kills.md. A start takes some
seconds where the machine is free.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from tests.faults.forked import Ends, nursery
from tests.faults.traps import Kill, Note
from tests.online_jobs import make_prompts, make_tokenizer, steps

SIZE, STEPS, SAVES_EVERY = 2, 8, 3
KILLS_EACH = 3
"""Of one run: each start but the last is killed."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {},
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
}
STAGES = ("rollout", "reward", "teacher", "update", "optimizer", "checkpoint", "evaluation")
"""Forward and backward passes are the stage `update`."""


def settings(folder: Path, name: str, layout: str) -> dict[str, Any]:
    """A run that has everything to remember."""
    return LAYOUTS[layout] | {
        "train_iters": STEPS,
        "lr_decay_iters": STEPS,
        "save": f"{folder}/{name}-checkpoints",
        "load": f"{folder}/{name}-checkpoints",
        "save_interval": SAVES_EVERY,
        "eval_iters": 1,
        "eval_interval": 4,
        "hybrid_eval_prompts": f"{folder}/held_out.jsonl",
        "hybrid_run_dir": f"{folder}/{name}",
        "hybrid_teacher_load": "self",
        "hybrid_teacher_ema_decay": 0.9,
        "hybrid_imitation_weight": 0.1,
        "hybrid_baseline": "running_mean",
        "hybrid_mini_batches": 2,
        "hybrid_samples_interval": 1,
        "hybrid_max_response_length": 2,
    }


def make_inputs(folder: Path) -> None:
    make_tokenizer(folder / "tokenizer")
    make_prompts(folder / "prompts.jsonl")
    (folder / "held_out.jsonl").write_text("".join(f'{{"prompt": "w{i} w3", "answer": "w4"}}\n' for i in range(14)))


def left_by(folder: Path, name: str) -> dict[str, Any]:
    """All of a finished run that must not depend on what happened to it."""
    last = f"iter_{STEPS:07d}"
    return {
        "checkpoint": tensors(folder / f"{name}-checkpoints" / last),
        "copy": tensors(folder / f"{name}-checkpoints" / "hybrid_teacher" / last),
        "steps": steps(folder, name),
        "evaluations": steps(folder, name, kind="eval"),
        "samples": (folder / name / "samples.jsonl").read_text(),
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_hybrid.mcore.checkpoint_io import _whole_tensors

    kept = FileSystemReader(folder).read_metadata().state_dict_metadata
    return _whole_tensors(folder, {name for name, entry in kept.items() if isinstance(entry, TensorStorageMetadata)})


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What of two runs is not equal; tensors by their bits."""
    found = [what for what in ours if what not in ("checkpoint", "copy") and ours[what] != theirs[what]]
    for what in ("checkpoint", "copy"):
        a, b = ours[what], theirs[what]
        found += [f"{what} {name}" for name in a.keys() ^ b.keys()]
        found += [f"{what} {name}" for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return found


@dataclass(frozen=True)
class Outcome:
    """What became of one killed start."""

    layout: str
    aimed: str
    hit: str
    who: str
    resumed_from: int
    lost: int
    """Steps that had to be done again."""
    wrong: tuple[str, ...]
    """Empty: as if nothing had happened."""

    def row(self) -> str:
        end = "equal" if not self.wrong else "; ".join(self.wrong)
        return f"| {self.layout} | {self.aimed} | {self.hit} | {self.who} | {self.resumed_from} | {self.lost} | {end} |"


class Campaign:
    """Kills in one folder, with one process that forks ranks; the runs that nobody kills are made on demand."""

    def __init__(self, folder: Path, ask: Callable[..., Ends], seed: int) -> None:
        self.folder, self.ask = folder, ask
        self.dice = random.Random(seed)
        self._expected: dict[str, dict[str, Any]] = {}
        self._moments: dict[str, list[tuple[int, str, float]]] = {}
        make_inputs(folder)

    def quiet(self, layout: str) -> dict[str, Any]:
        """What the run leaves that nobody kills."""
        if layout not in self._expected:
            name = f"quiet {layout}".replace(" ", "-")
            note = Note(f"{self.folder}/{name}.moments")
            ends = self.ask(self.folder, name, settings(self.folder, name, layout), SIZE, note)
            assert not any(ends.codes), ends.logs
            lines = [json.loads(line) for line in Path(f"{note.file}.rank0").read_text().splitlines()]
            later = zip(lines, lines[1:], strict=False)
            self._moments[layout] = [(step, stage, end - begin) for (begin, step, stage), (end, _, _) in later]
            self._expected[layout] = left_by(self.folder, name)
        return self._expected[layout]

    def kill(self, name: str, layout: str, stages: Sequence[str], *, everybody: bool | None = None) -> list[Outcome]:
        """One run, killed once in or soon after each of the stages and started again; what became of each start.

        Fewer than the stages where one is killed behind its last checkpoint: nothing is left to kill then.

        everybody  both ranks or one; None: by chance
        """
        expected = self.quiet(layout)
        outcomes = []
        for number, stage in enumerate(stages):
            if self._saved(name) == STEPS:
                break
            both = self.dice.random() < 0.4 if everybody is None else everybody
            outcomes.append(self._killed_start(name, layout, stage, number, everybody=both))
        last = self.ask(self.folder, name, settings(self.folder, name, layout), SIZE)
        if any(last.codes):
            wrong = [f"the last start ended with {last.codes}: {last.logs[0].splitlines()[-1]}"]
        else:
            wrong = differences(left_by(self.folder, name), expected)
        return [replace(outcome, wrong=(*outcome.wrong, *wrong)) for outcome in outcomes]

    def _killed_start(self, name: str, layout: str, stage: str, number: int, *, everybody: bool) -> Outcome:
        begins = self._saved(name)
        moments = [moment for moment in self._moments[layout] if moment[1] == stage and moment[0] > begins]
        step, stage, seconds = self.dice.choice(moments or [m for m in self._moments[layout] if m[0] > begins])
        file, victim = f"{self.folder}/{name}.killed{number}", self.dice.randrange(SIZE)
        trap = Kill(file, victim, step, stage, self.dice.uniform(0, seconds), everybody)
        ends = self.ask(self.folder, name, settings(self.folder, name, layout), SIZE, trap)
        wrong = [f"processes {ends.left} left behind"] if ends.left else []
        if ends.codes[victim] != -9:
            wrong.append(f"ended with {ends.codes}: nobody was killed")
        *_, last_words = ends.logs[1 - victim].splitlines() or [""]
        if not everybody and f"rank {victim} " not in last_words.partition(" and ")[2]:
            wrong.append(f"the other rank does not say who died, but: {last_words}")
        journal = self.folder / name / "metrics.jsonl"
        done = max((record["step"] for record in steps(self.folder, name)), default=0) if journal.exists() else 0
        lost = max(0, done - self._saved(name))
        if lost > SAVES_EVERY:
            wrong.append(f"{lost} steps lost")
        at = "{1} of step {0}".format(*json.loads(Path(file).read_text())) if Path(file).exists() else "-"
        who = "all" if everybody else f"rank {victim}"
        return Outcome(layout, f"{stage} of step {step}", at, who, self._saved(name), lost, tuple(wrong))

    def _saved(self, name: str) -> int:
        tracker = self.folder / f"{name}-checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text() or 0) if tracker.exists() else 0

    def clean(self, name: str) -> None:
        for path in self.folder.glob(f"{name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs and table go; left as it is then")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with nursery() as ask:
        campaign = Campaign(folder, ask, asked.seed)
        began = time.monotonic()
        layouts = cycle(LAYOUTS)
        while len(outcomes) < asked.runs:
            number = len(outcomes)
            stages = [STAGES[n % len(STAGES)] for n in range(number, min(number + KILLS_EACH, asked.runs))]
            name = f"killed-{number}"
            found = campaign.kill(name, next(layouts), stages)
            outcomes += found
            if not any(outcome.wrong for outcome in found):
                campaign.clean(name)
            took_s = (time.monotonic() - began) / len(outcomes)
            left_s = took_s * (asked.runs - len(outcomes))
            print(f"{len(outcomes)}/{asked.runs}  {took_s:.0f} s each  left {left_s:.0f} s", flush=True)
            print("".join(outcome.row() + "\n" for outcome in found), end="", flush=True)
            write_table(folder / "kills.md", outcomes, asked.seed)
    failed = [outcome for outcome in outcomes if outcome.wrong]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} killed starts went on exactly; {folder / 'kills.md'}")
    raise SystemExit(bool(failed))


def write_table(path: Path, outcomes: list[Outcome], seed: int) -> None:
    """All of it, and how many per stage in which a rank was hit."""
    hits = Counter(outcome.hit.partition(" ")[0] for outcome in outcomes)
    exact = Counter(outcome.hit.partition(" ")[0] for outcome in outcomes if not outcome.wrong)
    head = f"{len(outcomes)} killed starts, seed {seed}; most steps done again: {max(o.lost for o in outcomes)}\n\n"
    head += "| hit in | starts | went on exactly |\n|---|---|---|\n"
    head += "".join(f"| {stage} | {count} | {exact[stage]} |\n" for stage, count in sorted(hits.items()))
    head += "\n| layout | aimed at | hit in | killed | resumed from | steps done again | compared |\n"
    head += "|---|---|---|---|---|---|---|\n"
    path.write_text(head + "".join(outcome.row() + "\n" for outcome in outcomes))


if __name__ == "__main__":
    main()
