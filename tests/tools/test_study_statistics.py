"""The statistics of the study of variance, by hand and on gradients whose covariance is known."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from study_markdown import between  # noqa: E402
from study_statistics import combined, interval, moments  # noqa: E402


def test_three_batches_by_hand():
    found = moments(np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]), np.array([[1.0, 0.0]]))
    assert found.second[0] == pytest.approx((1 + 9 + 13) / 3)
    assert found.signal[0] == pytest.approx((3 + 2 + 6) / 3)  # the three pairs
    assert found.variance[0] == pytest.approx(1 + 3)  # of each column, divided by B - 1
    assert found.cross[0] == pytest.approx(2)
    assert found.squared_bias[0] == pytest.approx(11 / 3 - 2 * 2 + 1)


def test_the_covariance_is_found_and_an_interval_holds_it():
    draw = np.random.default_rng(3)
    deviations = np.array([2.0, 1.0, 0.5, 0.5])
    mean = np.array([1.0, -1.0, 0.0, 2.0])
    batches = mean + deviations * draw.standard_normal((256, 4))
    reference = mean + deviations * draw.standard_normal((512, 4))
    found = moments(batches, reference)
    variance = interval(found.variance)
    # A sum of squares of 256 draws is known to a tenth: the interval is as wide, and holds the truth.
    assert variance.low < (deviations**2).sum() < variance.high < 1.3 * (deviations**2).sum()
    assert interval(found.bias).low < 0 < interval(found.bias).high
    assert interval(found.cosine).value == pytest.approx(1, abs=0.03)


def test_a_bias_is_found():
    draw = np.random.default_rng(4)
    batches = np.array([2.0, 1.0]) + 0.5 * draw.standard_normal((128, 2))
    found = interval(moments(batches, np.array([[2.0, 0.0]])).bias)
    assert found.low > 0.3
    assert found.value == pytest.approx(0.5, abs=0.1)  # |(0, 1)| / |(2, 0)|; the noise of the mean is 0.04


def test_without_noise_the_variance_is_nothing_and_the_bias_exact():
    found = moments(np.tile([3.0, 4.0], (8, 1)), np.array([[3.0, 0.0]]))
    assert np.abs(found.variance).max() < 1e-9
    assert found.bias[0] == pytest.approx(4 / 3)
    assert found.cosine[0] == pytest.approx(0.6)


def test_parts_add_up_to_an_estimator():
    parts = np.arange(12.0).reshape(2, 3, 1, 2)
    assert combined(parts, ["a", "b", "c"], {"c": 2.0, "a": -1.0, "b": 0.0}).tolist() == [[[8.0, 9.0]], [[14.0, 15.0]]]


def test_lines_are_put_between_the_markers_and_nowhere_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    between(page, "a", ["new", ""])
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- end of a -->\nafter\n"
    with pytest.raises(SystemExit, match="needs the line <!-- b -->"):
        between(page, "b", ["x"])
