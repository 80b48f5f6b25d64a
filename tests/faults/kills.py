"""Runs of two ranks, killed at random moments and started again: nothing may be lost but time.

    python -m tests.faults.kills --runs 30 --seed 0 [--folder FOLDER]

A run keeps all that a run can: a copy of the student that follows it, the mean of earlier rewards, a collection that
several steps learn from, held-out evaluations. SIGKILL for one rank or for both, a random time after one of the stages
has begun; then the same command again. Compared with a run that nobody killed, bit for bit: every tensor of the last
checkpoint, optimizer included, and of the copy; all lines of metrics.jsonl (without clock and timings) and
samples.jsonl. The table goes to FOLDER/kills.md. A run takes some seconds where the machine is free.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults.forked import Ends, nursery
from tests.faults.traps import Kill, Note
from tests.online_jobs import make_prompts, make_tokenizer, steps

SIZE, STEPS, SAVES_EVERY = 2, 8, 3
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
    """What became of one killed run."""

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

    def kill(self, name: str, layout: str, stage: str, *, everybody: bool, lasting: bool = True) -> Outcome:
        """One killed run, and its second start; `lasting`: at any moment of the stage, not only at its beginning."""
        expected = self.quiet(layout)
        step, _, seconds = self.dice.choice([moment for moment in self._moments[layout] if moment[1] == stage])
        after_s = self.dice.uniform(0, seconds) if lasting else 0.0
        trap = Kill(f"{self.folder}/{name}.killed", self.dice.randrange(SIZE), step, stage, after_s, everybody)
        flags = settings(self.folder, name, layout)
        first = self.ask(self.folder, name, flags, SIZE, trap)
        wrong = [f"processes {first.left} left behind"] if first.left else []
        if first.codes[trap.rank] != -9:
            wrong.append(f"ended with {first.codes}: nobody was killed")
        if (
            not everybody
            and f"rank {trap.rank} " not in first.logs[1 - trap.rank].splitlines()[-1].partition(" and ")[2]
        ):
            wrong.append("the other rank does not say who died: " + first.logs[1 - trap.rank].splitlines()[-1])
        tracker = self.folder / f"{name}-checkpoints" / "latest_checkpointed_iteration.txt"
        resumed_from = int(tracker.read_text()) if tracker.exists() else 0
        journal = self.folder / name / "metrics.jsonl"
        done = max((record["step"] for record in steps(self.folder, name)), default=0) if journal.exists() else 0
        if done - resumed_from > SAVES_EVERY:
            wrong.append(f"{done - resumed_from} steps lost")
        second = self.ask(self.folder, name, flags, SIZE)
        if any(second.codes):
            wrong.append(f"the second start ended with {second.codes}: {second.logs[0].splitlines()[-1]}")
        else:
            wrong += differences(left_by(self.folder, name), expected)
        hit = Path(trap.file)
        at = "{1} of step {0}".format(*json.loads(hit.read_text())) if hit.exists() else "-"
        who = "all" if everybody else f"rank {trap.rank}"
        lost = max(0, done - resumed_from)
        return Outcome(layout, f"{stage} of step {step}", at, who, resumed_from, lost, tuple(wrong))

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
        for number in range(asked.runs):
            stage, layout = STAGES[number % len(STAGES)], list(LAYOUTS)[number // len(STAGES) % len(LAYOUTS)]
            name = f"killed-{number}"
            outcome = campaign.kill(name, layout, stage, everybody=campaign.dice.random() < 0.4)
            outcomes.append(outcome)
            if not outcome.wrong:
                campaign.clean(name)
            took_s = (time.monotonic() - began) / (number + 1)
            left_s = took_s * (asked.runs - number - 1)
            print(f"{number + 1}/{asked.runs}  {took_s:.0f} s a run  left {left_s:.0f} s  {outcome.row()}", flush=True)
            write_table(folder / "kills.md", outcomes, asked.seed)
    failed = [outcome for outcome in outcomes if outcome.wrong]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} killed runs went on exactly; {folder / 'kills.md'}")
    raise SystemExit(bool(failed))


def write_table(path: Path, outcomes: list[Outcome], seed: int) -> None:
    """All of it, and how many per stage in which a rank was hit."""
    hits = Counter(outcome.hit.partition(" ")[0] for outcome in outcomes)
    exact = Counter(outcome.hit.partition(" ")[0] for outcome in outcomes if not outcome.wrong)
    head = f"{len(outcomes)} killed runs, seed {seed}; most steps done again: {max(o.lost for o in outcomes)}\n\n"
    head += "| hit in | runs | went on exactly |\n|---|---|---|\n"
    head += "".join(f"| {stage} | {count} | {exact[stage]} |\n" for stage, count in sorted(hits.items()))
    head += "\n| layout | aimed at | hit in | killed | resumed from | steps done again | compared |\n"
    head += "|---|---|---|---|---|---|---|\n"
    path.write_text(head + "".join(outcome.row() + "\n" for outcome in outcomes))


if __name__ == "__main__":
    main()
