"""Samples: rows survive their file, pages say what they hold, and no answer of a model breaks one."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hybrid.train import journal
from megatron_hybrid.train.samples import Sample, markdown, panel, shade, table

ROOT = Path(__file__).parents[2]
SHADED = Sample("3 + 4?", "is seven", "7", 1.0, kl_per_token=(0.01, 2.5), tokens=("is", " seven"), task="sums")
HOSTILE = Sample("[bold]x[/bold] | y", "```\n# not a heading\n````", None, 0.0, truncated=True)


def rendered(*parts: object, width: int = 100) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in parts:
        console.print(part)
    return file.getvalue()


def test_tokens_and_kl_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 tokens but 1 values of KL"):
        Sample("p", "r", None, 0.0, kl_per_token=(0.1,), tokens=("a", "b"))


@pytest.mark.parametrize("row", [SHADED, HOSTILE, Sample("p", "NaN", "Infinity", float("nan"), (float("inf"),))])
def test_a_row_survives_its_file(row: Sample, tmp_path: Path):
    journal.append(tmp_path / "samples.jsonl", {"step": 1, **row.as_record()})
    (record,) = journal.read(tmp_path / "samples.jsonl")
    assert repr(Sample.from_record(record)) == repr(row)  # repr: NaN equals itself there


def test_a_response_cannot_leave_its_code_block():
    lines = markdown(3, [HOSTILE]).split("\n")
    fence = next(i for i, line in enumerate(lines) if line == "`````text" and lines[i + 1] == "```")
    assert lines[fence + 1 : fence + 5] == ["```", "# not a heading", "````", "`````"]


def test_a_page_holds_question_answer_reward_and_kl():
    page = markdown(7, [SHADED])
    assert "# Samples after step 7" in page and "| 1 | sums | 1 | 1.25 | 2 | 7 |" in page
    assert "KL per token, nats: 0.01 2.5" in page


def test_markup_in_a_prompt_is_shown_as_it_is():
    assert "[bold]x[/bold]" in rendered(table(1, [HOSTILE])) and "[bold]x[/bold]" in rendered(panel(1, HOSTILE))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_console(width: int):
    long = Sample("why " * 200, "b" * 500, "c" * 100, 0.5, tuple(0.1 for _ in range(300)), task="t" * 30)
    text = rendered(table(1, [long, SHADED]), panel(1, long), width=width)
    assert max(map(len, text.split("\n"))) <= width


def test_shades_grow_with_the_kl_and_nan_is_the_strongest():
    assert shade(0.05) == "" and len({shade(0.05), shade(0.1), shade(0.5), shade(2.0)}) == 4
    assert shade(float("nan")) == shade(99.0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step, row in ((1, HOSTILE), (2, HOSTILE), (2, SHADED)):
        journal.append(tmp_path / "samples.jsonl", {"step": step, **row.as_record()})
    return tmp_path


def show(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "show_rollouts.py", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_tool_shows_the_newest_samples_worst_first(run_dir: Path):
    shown = show(run_dir, "--worst").stdout
    assert "step 1" not in shown
    assert shown.index("# not a heading") < shown.index("is seven")


def test_the_tool_selects_by_step_and_task(run_dir: Path):
    assert show(run_dir, "--step", 1).stdout.count("reward") == 1
    assert "is seven" in show(run_dir, "--all", "--task", "sums").stdout
    nothing = show(run_dir, "--step", 9)
    assert nothing.returncode == 1 and "holds steps 1, 2" in nothing.stderr


def test_the_tool_says_where_samples_should_be(tmp_path: Path):
    missing = show(tmp_path)
    assert missing.returncode == 2 and "holds no samples.jsonl" in missing.stderr
