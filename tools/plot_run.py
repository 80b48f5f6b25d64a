"""Draws the figures of a run folder into its plots/, also while the run goes on. Seconds; needs matplotlib.

python tools/plot_run.py runs/first
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Draws, and prints the path of every figure."""
    parser = argparse.ArgumentParser(description="Draw the figures of a run folder into its plots/.")
    parser.add_argument("run_dir", type=Path, help="folder that holds metrics.jsonl")
    run_dir = parser.parse_args().run_dir
    if not (run_dir / "metrics.jsonl").exists():
        parser.error(f"{run_dir} holds no metrics.jsonl: give the folder named by --hybrid-run-dir")
    from megatron_hybrid.train.plots import draw

    paths = draw(run_dir)
    if not paths:
        print(f"{run_dir / 'metrics.jsonl'} has no step yet", file=sys.stderr)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
