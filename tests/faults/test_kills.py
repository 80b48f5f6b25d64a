"""A killed run goes on as if nothing had happened: quick cases of `python -m tests.faults.kills`."""

from __future__ import annotations

import pytest

from tests.faults.kills import LAYOUTS, STAGES, Campaign, differences

pytestmark = pytest.mark.procs


def test_one_rank_killed_while_a_checkpoint_is_written_costs_time_only(campaign: Campaign) -> None:
    (outcome,) = campaign.kill("saving", "DP 2", ["checkpoint"], everybody=False)
    assert not outcome.wrong, outcome


def test_a_difference_of_one_bit_would_be_seen(campaign: Campaign) -> None:
    quiet = campaign.quiet("DP 2")
    assert not differences(quiet, quiet)
    name, tensor = next(iter(quiet["checkpoint"].items()))
    nearly = tensor.clone()
    nearly.view(-1)[0] = nearly.view(-1)[0].nextafter(nearly.view(-1)[0] + 1)
    other = quiet | {"checkpoint": quiet["checkpoint"] | {name: nearly}, "samples": quiet["samples"] + "\n"}
    assert differences(other, quiet) == ["samples", f"checkpoint {name}"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_in_every_stage_of_any_layout(campaign: Campaign, layout: str) -> None:
    for outcome in campaign.kill(layout.replace(" ", ""), layout, STAGES):
        assert not outcome.wrong, outcome
