"""One target guided by coverage: atheris (libFuzzer) mutates the bytes that hypothesis draws its cases from.

    pip install atheris
    python -m tests.fuzz.guided "prompts, jsonl" -runs=100000

What follows the target's name is libFuzzer's. Ends at the first finding, with the case and its bytes; slower by the
instrumented package, better at what few inputs reach. atheris is no requirement of the tests.
"""

from __future__ import annotations

import logging
import sys

import atheris
from hypothesis import given

with atheris.instrument_imports(include=["megatron_hybrid"]):
    from tests.fuzz.targets import targets

    KNOWN = targets()  # imports what is to be instrumented


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in KNOWN:
        sys.exit(f"give the name of a target: {', '.join(map(repr, KNOWN))}")
    target = KNOWN[sys.argv.pop(1)]
    logging.disable(logging.WARNING)  # each record that is left out is said

    def check(case: object) -> None:
        target.check(case)

    atheris.Setup(sys.argv, given(target.cases)(check).hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
