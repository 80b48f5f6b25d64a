"""Draws cases for every target until so many are done, and prints a table.

    python -m tests.fuzz --cases 100000                    all targets together, in equal parts
    python -m tests.fuzz --cases 20000 --only "prompts, jsonl" --seed 7

Cases are drawn anew in rounds, each from a seed that is printed where it finds something: `--seed` draws it again.
A finding ends its target, not the others. Minutes on one core; status 1 where something was found.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from datetime import timedelta

ROUND = 1000
"""Cases between lines of progress; hypothesis keeps what it has tried in a round, and forgets it behind."""

_SHOWN = 4000
"""Characters of a finding: its end, with the smallest case."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together (default: 100000)")
    parser.add_argument("--only", action="append", help="name of a target; may be given several times")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; default: the time")
    args = parser.parse_args()

    import logging

    from tests.fuzz.targets import run, targets

    logging.disable(logging.WARNING)  # each record that is left out is said
    chosen = {name: target for name, target in targets().items() if args.only is None or name in args.only}
    if not chosen:
        parser.error(f"--only names none of {', '.join(targets())}")
    share = -(-args.cases // len(chosen))
    seed = int(time.time()) if args.seed is None else args.seed
    rows, began, total = [], time.perf_counter(), 0
    for name, target in chosen.items():
        done, found, started = 0, "none", time.perf_counter()
        while done < share and found == "none":
            try:
                done += run(target, min(ROUND, share - done), seeded=seed)
            except Exception:
                found = f"seed {seed}"
                print(traceback.format_exc()[-_SHOWN:])
            seed += 1
            spent = time.perf_counter() - started
            rate = done / max(spent, 1e-9)
            everything = (total + done) / max(time.perf_counter() - began, 1e-9)
            left = timedelta(seconds=round((share * len(chosen) - total - done) / max(everything, 1e-9)))
            print(f"{name}: {done}/{share}  {rate:.0f} cases/s  left in all {left}", flush=True)
        total += done
        rows.append((name, done, time.perf_counter() - started, found))
    print(f"\n| {'target':<26} | {'cases':>7} | {'seconds':>7} | findings |\n| :-- | --: | --: | :-- |")
    for name, done, spent, found in rows:
        print(f"| {name:<26} | {done:>7} | {spent:>7.0f} | {found} |")
    print(f"{total} cases in {timedelta(seconds=round(time.perf_counter() - began))}")
    return int(any(found != "none" for *_, found in rows))


if __name__ == "__main__":
    sys.exit(main())
