"""Prints the samples of a run folder: prompt, response, expected answer, reward, and the KL of each token in colour.

python tools/show_rollouts.py runs/first                       # the newest samples
python tools/show_rollouts.py runs/first --step 40 --task sums --worst
python tools/show_rollouts.py runs/first --all | less -R       # colours survive with FORCE_COLOR=1
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    """Selects rows of samples.jsonl and prints each in full."""
    parser = argparse.ArgumentParser(description="Print the samples of a run with reward and KL per token in colour.")
    parser.add_argument("run_dir", type=Path, help="folder that holds samples.jsonl")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="samples of this step; default: of the newest one")
    which.add_argument("--all", action="store_true", help="samples of every step")
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--worst", action="store_true", help="lowest reward first, then highest KL")
    parser.add_argument("--limit", type=int, help="at most this many")
    args = parser.parse_args()
    path = args.run_dir / "samples.jsonl"
    if not path.exists():
        parser.error(f"{args.run_dir} holds no samples.jsonl: give the folder named by --hybrid-run-dir")

    from rich.console import Console

    from megatron_hybrid.train import journal
    from megatron_hybrid.train.samples import Sample, legend, panel

    rows = [(record["step"], Sample.from_record(record)) for record in journal.read(path)]
    steps = sorted({step for step, _ in rows})
    if not args.all:
        wanted = steps[-1] if args.step is None and steps else args.step
        rows = [(step, row) for step, row in rows if step == wanted]
    if args.task is not None:
        rows = [(step, row) for step, row in rows if row.task == args.task]
    if args.worst:
        rows.sort(key=lambda pair: (pair[1].reward, -(pair[1].kl or 0.0)))
    if not rows:
        print(f"no samples match; {path} holds steps {', '.join(map(str, steps)) or 'none'}", file=sys.stderr)
        return 1

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(legend())
    for step, row in rows[: args.limit]:
        console.print(panel(step, row))
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has seen enough. Python flushes once more at exit, which must find an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
