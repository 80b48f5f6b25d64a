"""Draws cases for every target until so many are done, and prints a table.

    python -m tests.fuzz --cases 100000                    all targets together, in equal parts
    python -m tests.fuzz --cases 20000 --only "prompts, jsonl" --seed 7

Targets take turns in rounds, each from a seed of its own that is printed where it finds something: `--seed` draws it
again. A finding ends its target, not the others; Ctrl-C ends all, with the table so far. Status 1 where something was
found.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

ROUND = 500
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

    from tests.fuzz.targets import targets

    logging.disable(logging.WARNING)  # each record that is left out is said
    chosen = {name: target for name, target in targets().items() if args.only is None or name in args.only}
    if not chosen:
        parser.error(f"--only names none of {', '.join(targets())}")
    share = -(-args.cases // len(chosen))
    seed = int(time.time()) if args.seed is None else args.seed
    rows = {name: Row() for name in chosen}
    began = time.perf_counter()
    try:
        while unfinished := [name for name, row in rows.items() if row.done < share and row.found == "none"]:
            for name in unfinished:
                rows[name].round(chosen[name], min(ROUND, share - rows[name].done), seed)
                seed += 1
                _say(name, rows, share, began)
    except KeyboardInterrupt:
        print("stopped")
    print(f"\n| {'target':<26} | {'cases':>7} | {'seconds':>7} | findings |\n| :-- | --: | --: | :-- |")
    for name, row in rows.items():
        print(f"| {name:<26} | {row.done:>7} | {row.spent_s:>7.0f} | {row.found} |")
    print(f"{sum(row.done for row in rows.values())} cases in {timedelta(seconds=round(time.perf_counter() - began))}")
    return int(any(row.found != "none" for row in rows.values()))


@dataclass
class Row:
    """How far one target is."""

    done: int = 0
    spent_s: float = 0.0
    found: str = "none"

    def round(self, target: Target, cases: int, seed: int) -> None:
        from tests.fuzz.targets import run

        started = time.perf_counter()
        try:
            self.done += max(run(target, cases, seeded=seed), 1)
        except Exception:
            self.found = f"seed {seed}"
            print(traceback.format_exc()[-_SHOWN:])
        self.spent_s += time.perf_counter() - started


def _say(name: str, rows: dict[str, Row], share: int, began: float) -> None:
    row = rows[name]
    done, wanted = sum(each.done for each in rows.values()), share * len(rows)
    left = timedelta(seconds=round((time.perf_counter() - began) / max(done, 1) * max(wanted - done, 0)))
    rate = row.done / max(row.spent_s, 1e-9)
    print(f"{name}: {row.done}/{share}  {rate:.0f} cases/s  all: {done}/{wanted}, left {left}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
