"""Curves and figures: smoothing does not bend what is straight, and every state of a run can be drawn."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_hybrid.train import journal
from megatron_hybrid.train.curves import load, smoothed
from megatron_hybrid.train.plots import PANELS, draw

ROOT = Path(__file__).parents[2]
STAGES = {"timing_s/rollout": 2.0, "timing_s/reward": 0.5, "timing_s/teacher": 0.5, "timing_s/update": 1.0}


def record(run_dir: Path, num_steps: int, **extra: float) -> Path:
    for step in range(1, num_steps + 1):
        values = {"critic/score/mean": 0.5, "actor/kl_loss": 0.1, "actor/grad_norm": 1.0, "actor/entropy": 1.0}
        values |= {"response_length/mean": 9.0, "response_length/min": 1.0, "response_length/max": 20.0}
        journal.append(
            run_dir / "metrics.jsonl", {"step": step, "kind": "step", "time": 0, **values, **STAGES, **extra}
        )
    journal.append(run_dir / "metrics.jsonl", {"step": num_steps, "kind": "eval", "time": 0, "val/kl": 0.05})
    return run_dir


def drawn_panel(run_dir: Path, name: str) -> Figure:
    figure = Figure()
    assert PANELS[name](figure.subplots(), load(run_dir / "metrics.jsonl"))
    return figure


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_smoothing_leaves_a_straight_line_alone(n: int):
    line = 3.0 - 0.25 * np.arange(n)
    # fp64 sums over windows of at most 41 points of size below 300.
    np.testing.assert_allclose(smoothed(line), line, atol=1e-9)


def test_smoothing_is_the_moving_mean_where_the_window_is_whole():
    values = np.random.default_rng(0).normal(size=200)
    assert smoothed(values)[50] == pytest.approx(values[46:55].mean())  # 200 // 50 on each side


def test_smoothing_leaves_nan_out_and_reaches_over_it():
    values = np.arange(500.0)
    values[[0, 100, 499]] = math.nan
    np.testing.assert_allclose(smoothed(values), np.arange(500.0), atol=1e-9)
    assert np.isnan(smoothed(np.full(100, math.nan))).all()


def test_curves_turn_the_strings_of_non_finite_numbers_into_gaps(tmp_path: Path):
    for step, value in enumerate((1.0, math.nan, math.inf), start=1):
        journal.append(tmp_path / "metrics.jsonl", {"step": step, "kind": "step", "time": 0, "x": value})
    steps, values = load(tmp_path / "metrics.jsonl").train["x"]
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(values, [1.0, math.nan, math.nan])


def test_time_shares_add_up_to_the_step(tmp_path: Path):
    figure = drawn_panel(record(tmp_path, 3, **{"timing_s/step": 5.0}), "timing")
    (ax,) = figure.axes
    bounds = [area.get_paths()[0].get_extents().ymax for area in ax.collections]
    assert bounds == pytest.approx([40.0, 50.0, 60.0, 80.0, 100.0])  # fp64 division
    assert [area.get_label() for area in ax.collections] == ["rollout", "teacher", "reward", "update", "other"]


def test_stages_that_fill_the_step_leave_no_other(tmp_path: Path):
    figure = drawn_panel(record(tmp_path, 3, **{"timing_s/step": 4.0}), "timing")
    assert "other" not in [area.get_label() for area in figure.axes[0].collections]


@pytest.mark.parametrize("name", PANELS)
def test_axes_have_labels_and_units(tmp_path: Path, name: str):
    (ax,) = drawn_panel(record(tmp_path, 3), name).axes
    assert ax.get_title(loc="left") or ax.get_title()
    assert ax.get_xlabel() == "optimizer step" and ax.get_ylabel()


@pytest.mark.parametrize("num_steps", [1, 60])
def test_a_run_of_any_length_is_drawn(tmp_path: Path, num_steps: int):
    paths = draw(record(tmp_path, num_steps))
    assert [path.name for path in paths] == [*(f"{name}.png" for name in PANELS), "overview.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_what_was_not_recorded_gets_no_file_of_its_own(tmp_path: Path):
    journal.append(tmp_path / "metrics.jsonl", {"step": 1, "kind": "step", "time": 0, "actor/entropy": math.nan})
    journal.append(tmp_path / "metrics.jsonl", {"step": 1, "kind": "eval", "time": 0, "val/score": 1.0})
    assert [path.name for path in draw(tmp_path)] == ["reward.png", "overview.png"]


def test_a_run_without_a_step_is_not_drawn(tmp_path: Path):
    assert draw(tmp_path) == [] and not list(tmp_path.iterdir())


def test_drawing_leaves_the_settings_of_the_host_alone(tmp_path: Path):
    # dict.get: reading the backend in the ordinary way would choose one, and import pyplot for that.
    code = """
import sys, matplotlib
settings = lambda: {name: dict.get(matplotlib.rcParams, name) for name in list(matplotlib.rcParams)}
before = settings()
from megatron_hybrid.train.plots import draw
draw(sys.argv[1])
print(before == settings(), "matplotlib.pyplot" in sys.modules)
"""
    environment = {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, record(tmp_path, 1)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "True False\n", done.stderr


def test_the_tool_draws_and_names_its_figures(tmp_path: Path):
    tool, environment = ROOT / "tools" / "plot_run.py", {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    missing = subprocess.run([sys.executable, tool, tmp_path], capture_output=True, text=True, env=environment)
    assert missing.returncode == 2 and "holds no metrics.jsonl" in missing.stderr
    command = [sys.executable, tool, record(tmp_path, 1)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[-2] == str(tmp_path / "plots" / "overview.png"), done.stderr
