"""A few drawn cases of every target, the same in every run; `python -m tests.fuzz` draws as many as one likes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.fuzz.targets import Target, run, targets

CASES = 200


@pytest.mark.parametrize("name", targets())
def test_drawn_inputs_keep_the_contract(name: str):
    assert run(targets()[name], CASES) > CASES / 2, "hypothesis has tried all that there is, or nothing"


@pytest.mark.parametrize("seeded", [None, 1])
def test_a_contract_that_is_broken_is_found(seeded):
    def check(number: int) -> None:
        assert number != 17

    with pytest.raises(AssertionError):
        run(Target(st.integers(0, 20), check), CASES, seeded=seeded)
