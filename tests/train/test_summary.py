"""Before and after: the change in % means something or is not there."""

import math

import pytest

from megatron_hybrid.train.summary import Change, compare, markdown


@pytest.mark.parametrize(
    ("before", "after", "percent"),
    [(0.8, 0.2, -75.0), (0.2, 0.6, 200.0), (-2.0, -1.0, 50.0), (-1.0, -2.0, -100.0), (3.0, 3.0, 0.0)],
)
def test_change_is_signed_and_relative_to_the_size_of_before(before: float, after: float, percent: float):
    assert Change("x", "x", before, after).percent == pytest.approx(percent)  # one division in fp64


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (None, 1.0), (1.0, None), (math.nan, 1.0), (1.0, math.inf)])
def test_no_change_where_it_means_nothing(before: float | None, after: float | None):
    assert Change("x", "x", before, after).percent is None
    assert Change("x", "x", before, after).cells()[3] == "-"


def test_rows_come_in_the_order_of_the_objective():
    after = dict.fromkeys(("other", "val/response_length", "val/score/b", "val/entropy", "val/score", "val/kl"), 1.0)
    names = [change.name for change in compare({"val/score/a": 1.0}, after)]
    assert names == ["val/kl", "val/score", "val/score/a", "val/score/b", "val/entropy", "val/response_length", "other"]


def test_markdown_is_a_table_with_units():
    text = markdown(compare({"val/kl": 0.8}, {"val/kl": 0.2}))
    assert text.split("\n")[2] == "| held-out reverse KL, nats/token | 0.8 | 0.2 | -75.0 % |"
