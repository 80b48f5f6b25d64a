"""Many steps of the real trainer on the tiny world of the examples: does its memory grow? A table and a picture.

python tools/soak.py                                   # 2,000 steps of the tiny model in one process
python tools/soak.py --model small --steps 200         # ten times the parameters, longer responses
python tools/soak.py --ranks 2 --out runs/soak_2       # two data-parallel replicas
python tools/soak.py --ranks 2 --out runs/soak_2 --table       # what it has seen, while it goes on or after

Each rank looks at itself every few steps: resident memory, Python objects and tensors among them, open files, threads.
Growth is the slope of Theil and Sen (the median of the slopes between any two samples, which no single outlier moves)
after the first fifth of the steps, where caches fill; a jump to a new level, as an allocator makes, reads as a slope
too: the picture tells the two apart. Nothing is collected for the occasion: objects that wait for Python's collector
are part of what a run holds. The samples are kept in OUT/soak_rank_<rank>.jsonl.
"""

import argparse
import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = {
    "tiny": ("", "two layers of 64: some 100,000 parameters"),
    "small": (
        "--num-layers 4 --hidden-size 144 --seq-length 32 --max-position-embeddings 32 --hybrid-max-response-length 16",
        "four layers of 144: a million parameters, responses of up to 16 tokens",
    ),
}
COMMON = (
    "--hybrid --hybrid-imitation-weight 0.1 --hybrid-group-size 8 --hybrid-max-response-length 4 --eval-iters 1 "
    "--eval-interval 100"
)
BATCH = 16
"""Responses of a step: what may grow does so by steps, not by their size."""
MEASURES = {
    "rss_mb": "resident memory, MB",
    "objects": "Python objects",
    "tensors": "tensors",
    "files": "open files",
    "threads": "threads",
}
WARM_UP = 5
"""The first fifth of the steps is not fitted."""


class Sampler:
    """Looks at this process every `every` steps, from inside Megatron's log of the step, and keeps it in `out`."""

    def __init__(self, every: int, steps: int, out: Path) -> None:
        self.every = every
        self.steps = steps
        self.out = out
        self.started = time.monotonic()

    def around(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's log, with a look behind it."""
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)  # the trainer reads its signature
        def log(*args: Any, **kwargs: Any) -> Any:
            result = training_log(*args, **kwargs)
            step = int(signature.bind(*args, **kwargs).arguments["iteration"])
            if step % self.every == 0 or step == 1:
                self._look(step)
            return result

        return log

    def _look(self, step: int) -> None:
        import gc

        import psutil
        import torch

        process, objects = psutil.Process(), gc.get_objects()
        sample = {
            "step": step,
            "rss_mb": process.memory_info().rss / 1e6,
            "objects": len(objects),
            "tensors": sum(issubclass(type(found), torch.Tensor) for found in objects),
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }
        rank = torch.distributed.get_rank()
        with open(samples_file(self.out, rank), "a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")
        if rank == 0:
            passed = time.monotonic() - self.started
            print(
                f"step {step}/{self.steps}  {sample['rss_mb']:.0f} MB  {step / passed:.2f} steps/s  "
                f"{passed / step * (self.steps - step) / 60:.1f} min left",
                file=sys.__stderr__,
                flush=True,
            )


def samples_file(out: Path, rank: int) -> Path:
    """Where a rank keeps what it has seen."""
    return out / f"soak_rank_{rank}.jsonl"


def soak(argv: list[str], every: int, steps: int, out: Path) -> None:
    """One rank's run."""
    from unittest import mock

    import tiny_world
    from megatron.training import training

    sampler = Sampler(every, steps, out)
    with mock.patch.object(training, "training_log", sampler.around(training.training_log)):
        tiny_world.train(argv)


def growth_per_1000(samples: list[dict[str, float]], name: str) -> float:
    """Theil and Sen's slope of a measure after the warm-up, per 1000 steps."""
    import numpy as np

    last = samples[-1]["step"]
    kept = [(s["step"], s[name]) for s in samples if s["step"] > last / WARM_UP]
    steps, values = np.array(kept).T
    first, second = np.triu_indices(len(steps), k=1)
    if len(first) == 0:
        return float("nan")
    return float(1000 * np.median((values[second] - values[first]) / (steps[second] - steps[first])))


def table(ranks: list[list[dict[str, float]]]) -> str:
    """Each measure of each rank: at its first sample, after the warm-up, at the end, and its growth."""
    lines = [f"{'rank':>4}  {'':<22}{'first':>12}{'after 1/5':>12}{'last':>12}{'per 1000 steps':>16}"]
    for rank, samples in enumerate(ranks):
        after = next(s for s in samples if s["step"] > samples[-1]["step"] / WARM_UP)
        for name, text in MEASURES.items():
            numbers = [samples[0][name], after[name], samples[-1][name]]
            grows = growth_per_1000(samples, name)
            lines.append(f"{rank:>4}  {text:<22}" + "".join(f"{x:12,.1f}" for x in numbers) + f"{grows:+16,.2f}")
    return "\n".join(lines)


def draw(ranks: list[list[dict[str, float]]], path: Path) -> None:
    """The measures over the steps, one panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, (name, text) in zip(figure.subplots(2, 3).flat, MEASURES.items(), strict=False):
        for rank, samples in enumerate(ranks):
            axes.plot([s["step"] for s in samples], [s[name] for s in samples], label=f"rank {rank}")
        axes.set(title=text, xlabel="optimizer step")
        axes.set_ylim(0, 1.15 * max(s[name] for samples in ranks for s in samples))
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_axis_off()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Runs, and prints the table."""
    parser = argparse.ArgumentParser(description="Many steps of the real trainer: does its memory grow?")
    parser.add_argument(
        "--model", choices=MODELS, default="tiny", help="; ".join(f"{k}: {v[1]}" for k, v in MODELS.items())
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel processes")
    parser.add_argument("--every", type=int, default=20, help="steps between two looks")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of the run, soak.json and soak.png")
    parser.add_argument("--table", action="store_true", help="run nothing: read what OUT has")
    args, further = parser.parse_known_args()
    if not args.table:
        run(args, further)
    ranks = [
        [json.loads(line) for line in samples_file(args.out, rank).read_text(encoding="utf-8").splitlines()]
        for rank in range(args.ranks)
    ]
    draw(ranks, args.out / "soak.png")
    print(f"{ranks[0][-1]['step']} steps of {args.out} on {args.ranks} rank(s)")
    print(table(ranks))
    return 0


def run(args: argparse.Namespace, further: list[str]) -> None:
    """The run itself; flags of no tool's go to Megatron."""

    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "examples"), str(root / "tools")]
    import tiny_world
    from soak import soak as job  # ranks find it by this name

    import megatron_hybrid as mh
    from megatron_hybrid.runtime.spawn import RankPool

    mh.cpu.enable()
    own = f"{COMMON} {MODELS[args.model][0]} --train-iters {args.steps} --hybrid-run-dir {args.out}"
    own += f" --global-batch-size {BATCH} --micro-batch-size {BATCH // args.ranks}"
    args.out.mkdir(parents=True, exist_ok=True)
    for rank in range(args.ranks):
        samples_file(args.out, rank).unlink(missing_ok=True)
    with tiny_world.made_world() as (_, flags), RankPool(args.ranks, init=False, timeout_s=86_400) as pool:
        pool.run(job, [*flags.split(), *own.split(), *further], args.every, args.steps, args.out)


if __name__ == "__main__":
    sys.exit(main())
