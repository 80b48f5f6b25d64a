"""The report: what a run leaves, what its progress line says, and that a resume loses nothing but what comes again."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.train import journal, report
from megatron_hybrid.train.report import RunReport, hours, progress_line
from megatron_hybrid.train.samples import Sample

ROOT = Path(__file__).parents[2]
STEP = {
    "critic/score/mean": 0.4123,
    "actor/kl_loss": 0.03124,
    "actor/entropy": 1.2,
    "response_length/mean": 45.25,
    "perf/throughput": 12345.6,
    "actor/grad_norm": 0.52,
    "timing_s/step": 2.0,
}
BEFORE = {"val/score": 0.2, "val/kl": 0.8, "val/score/sums": 0.2, "val/entropy": 1.0, "val/response_length": 40.0}
AFTER = {"val/score": 0.6, "val/kl": 0.2, "val/score/sums": 0.6, "val/entropy": 0.5, "val/response_length": 30.0}
ROW = Sample("3 + 4?", "seven", "7", 1.0, (0.1,), task="sums")


class Wandb:
    """The part of the wandb module that Megatron's writer is used for."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return journal.read(run_dir / name)


def test_a_step_is_one_line_of_its_file_and_one_of_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    RunReport(tmp_path, total_steps=400).step(12, STEP)
    (record,) = lines(tmp_path)
    assert record.pop("time") > 0
    assert record == {"step": 12, "kind": "step", **STEP}
    printed = capsys.readouterr().out
    assert printed == (
        "step  12/400  reward 0.412  kl 0.0312 nats/tok  entropy 1.200  length 45.2  12,346 tok/s  grad 0.52  "
        "left 0:12:56\n"  # 388 steps of 2 s
    )


def test_output_to_a_file_has_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunReport(tmp_path, total_steps=1)
    run.step(1, STEP)
    run.samples(1, [ROW])
    run.finish(BEFORE, AFTER)
    printed = capsys.readouterr().out
    assert "seven" in printed
    assert not [c for c in printed if ord(c) < 32 and c != "\n"]


def test_a_long_line_stays_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tasks = {f"val/score/[task {i}]": 0.5 for i in range(20)}
    RunReport(tmp_path, total_steps=1).evaluation(1, tasks)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and len(printed) > 300 and "score/[task 19] 0.5" in printed


def test_a_silent_console_still_leaves_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunReport(tmp_path, total_steps=1, console=False)
    run.step(1, STEP)
    run.evaluation(1, AFTER)
    run.samples(1, [ROW])
    run.finish()
    assert capsys.readouterr().out == ""
    assert {"metrics.jsonl", "samples.jsonl", "samples.md", "summary.json", "summary.md", "plots"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("value", [1e300, -1e300, -1e-300, math.nan, math.inf, -999999.4])
def test_no_progress_line_reaches_160_characters(value: float):
    assert len(progress_line(1_000_000, 1_000_000, dict.fromkeys(STEP, value), 99_999 * 3600.0)) < 160


def test_what_a_step_did_not_report_is_left_out_of_its_line():
    assert progress_line(3, 10, {"actor/kl_loss": 0.5}, None) == "step  3/10  kl 0.5 nats/tok"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00"), (-1, "0:00:00")]
)
def test_time_left_reads_h_mm_ss(seconds: float, text: str):
    assert hours(seconds) == text


def test_time_left_forgets_slow_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunReport(tmp_path, total_steps=105)
    for step, step_s in enumerate((500.0, 10.0, 10.0, 300.0, 10.0), start=1):
        run.step(step, {"timing_s/step": step_s})
    assert capsys.readouterr().out.split("\n")[4].endswith("left 0:16:40")  # 100 steps of 10 s


def test_time_left_without_a_step_time_comes_from_the_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    ticks = iter((100.0, 107.0))
    monkeypatch.setattr(report.time, "monotonic", lambda: next(ticks))
    run = RunReport(tmp_path, total_steps=12)
    run.step(1, {})
    run.step(2, {})
    assert capsys.readouterr().out.split("\n")[:2] == ["step  1/12", "step  2/12  left 0:01:10"]


def test_a_nan_step_is_recorded_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    RunReport(tmp_path, total_steps=1).step(1, {"actor/grad_norm": math.nan})
    assert lines(tmp_path)[0]["actor/grad_norm"] == "NaN"
    assert "grad nan" in capsys.readouterr().out


def test_tensorboard_gets_every_number(tmp_path: Path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = tensorboard.SummaryWriter(str(tmp_path / "tb"))
    run = RunReport(tmp_path, total_steps=2, tensorboard=writer, console=False)
    run.evaluation(0, BEFORE)
    run.step(1, STEP)
    run.step(2, STEP)
    run.samples(2, [ROW])
    writer.close()
    read = events.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(read.Tags()["scalars"]) == {*STEP, *BEFORE}
    # TensorBoard stores fp32.
    assert [(e.step, e.value) for e in read.Scalars("actor/kl_loss")] == [(s, pytest.approx(0.03124)) for s in (1, 2)]
    assert read.Tags()["tensors"] == ["samples/text_summary"]


def test_wandb_gets_every_number_under_its_step(tmp_path: Path):
    wandb = Wandb()
    run = RunReport(tmp_path, total_steps=2, wandb=wandb, console=False)
    run.evaluation(0, BEFORE)
    run.step(1, STEP)
    assert wandb.logged == [(BEFORE, 0), (STEP, 1)]


def test_real_wandb_works_offline_without_an_account(tmp_path: Path):
    """In a process of its own: wandb keeps threads and a service alive until its process ends."""
    pytest.importorskip("wandb")
    code = """
import sys, wandb
from megatron_hybrid.train.report import RunReport
wandb.init(project="p", name="n", dir=sys.argv[1], settings=wandb.Settings(console="off"))
run = RunReport(sys.argv[1], total_steps=2, wandb=wandb, console=False)
run.evaluation(0, {"val/kl": 0.5})
run.step(1, {"actor/kl_loss": float("nan")})
run.step(2, {"actor/kl_loss": 0.125})
run.step(3, {"actor/kl_loss": 0.25})
summary = dict(wandb.run.summary)  # up to step 2: wandb commits a step when a later one begins
wandb.finish()
print(summary["val/kl"], summary["actor/kl_loss"], summary["_step"])
"""
    environment = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.5", "0.125", "2"]
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"actor/kl_loss" in log.read_bytes()


def crashed_run(run_dir: Path) -> None:
    """Five steps, an evaluation and samples after 0 and 4, then a line that was never finished."""
    run = RunReport(run_dir, total_steps=10, console=False)
    run.config({"attempt": 1})
    run.evaluation(0, BEFORE)
    for step in range(1, 6):
        run.step(step, {**STEP, "attempt": 1})
        if step == 4:
            run.evaluation(step, AFTER)
            run.samples(step, [ROW])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "kind": "st')


def test_a_resumed_run_has_every_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    crashed_run(tmp_path)
    run = RunReport(tmp_path, total_steps=10, start_step=3)
    printed = capsys.readouterr().out
    assert "metrics.jsonl: 3 lines after step 3 moved aside" in printed
    assert "samples.jsonl: 1 lines after step 3 moved aside" in printed
    run.step(4, {"attempt": 2})
    run.evaluation(4, AFTER)
    assert [(r["step"], r["kind"], r.get("attempt")) for r in lines(tmp_path)] == [
        (0, "eval", None),
        (1, "step", 1),
        (2, "step", 1),
        (3, "step", 1),
        (4, "step", 2),
        (4, "eval", None),
    ]
    assert [r["step"] for r in lines(tmp_path, "metrics.dropped.jsonl")] == [4, 4, 5]


def test_a_fresh_run_in_a_used_folder_compares_with_its_own_beginning(tmp_path: Path):
    for before in (BEFORE, AFTER):  # the second run starts where the first one began
        run = RunReport(tmp_path, total_steps=1, console=False)
        run.evaluation(0, before)
        run.step(1, STEP)
        run.evaluation(1, AFTER)
    run.finish()
    assert [(record["kind"], record["step"]) for record in lines(tmp_path)] == [("eval", 0), ("step", 1), ("eval", 1)]
    assert json.loads((tmp_path / "summary.json").read_text())["val/kl"]["before"] == AFTER["val/kl"]
    assert len(lines(tmp_path, "metrics.dropped.jsonl")) == 3


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (2, [1, 2])])
def test_what_other_ranks_have_left_is_moved_aside_too(tmp_path: Path, start_step: int, kept: list[int]):
    """Records as those of metrics.jsonl; what rewards have printed, of which nobody knows the step, by a fresh run."""
    for replica in (0, 11):
        journal.append(tmp_path / f"failed_samples_{replica}.jsonl", *({"step": step} for step in (1, 2, 3)))
    (tmp_path / "reward_output_5.log").write_text("of an earlier run")
    for _ in range(2):  # what lies aside stays there
        RunReport(tmp_path, total_steps=9, start_step=start_step, console=False)
    for replica in (0, 11):
        assert [record["step"] for record in lines(tmp_path, f"failed_samples_{replica}.jsonl")] == kept
        aside = lines(tmp_path, f"failed_samples_{replica}.dropped.jsonl")
        assert [record["step"] for record in aside] == [step for step in (1, 2, 3) if step not in kept]
    output = "reward_output_5.log" if start_step else "reward_output_5.dropped.log"
    assert [file.name for file in tmp_path.glob("reward_output_*")] == [output]


def test_what_cannot_be_moved_aside_is_no_reason_not_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "failed_samples_0.jsonl").write_text("{}\n" * 2)
    RunReport(tmp_path, total_steps=9, console=False)
    assert "failed_samples_0.jsonl cannot be written (DataError: line 1 of" in caplog.text
    assert "what an earlier start left stays in it" in caplog.text


def test_a_resumed_run_compares_with_its_real_beginning(tmp_path: Path):
    crashed_run(tmp_path)
    run = RunReport(tmp_path, total_steps=10, start_step=3, console=False)
    run.evaluation(10, AFTER)
    run.finish()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["val/kl"]["before"], summary["val/kl"]["after"]) == (0.8, 0.2)


def test_a_resumed_run_keeps_the_configuration_of_its_first_attempt(tmp_path: Path):
    crashed_run(tmp_path)
    RunReport(tmp_path, total_steps=10, start_step=3, console=False).config({"attempt": 2})
    attempts = [json.loads((tmp_path / f).read_text()) for f in ("config.before_step_3.json", "config.json")]
    assert [a["config"]["attempt"] for a in attempts] == [1, 2]


def test_configuration_says_what_ran(tmp_path: Path):
    run = RunReport(tmp_path, total_steps=7, console=False)
    run.config({"weight": 1.0, "limit": math.inf, "folder": tmp_path})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == {"weight": 1.0, "limit": "Infinity", "folder": str(tmp_path)}
    assert written["command"][1:] == sys.argv and written["total_steps"] == 7
    assert {"python", "torch"} <= written["versions"].keys()


def test_git_revision_is_none_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.git_revision() is None


def test_git_revision_names_the_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    (tmp_path / "f").write_text("1")
    for arguments in (["init", "-q"], ["add", "f"], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", *arguments], check=True)
    found = report.git_revision()
    assert found is not None and len(found["revision"]) == 40 and not found["uncommitted_changes"]
    (tmp_path / "f").write_text("2")
    found = report.git_revision()
    assert found is not None and found["uncommitted_changes"]


def test_samples_page_holds_the_newest_and_the_journal_all(tmp_path: Path):
    run = RunReport(tmp_path, total_steps=2, console=False)
    run.samples(1, [ROW, ROW])
    run.samples(2, [ROW])
    assert [r["step"] for r in lines(tmp_path, "samples.jsonl")] == [1, 1, 2]
    page = (tmp_path / "samples.md").read_text()
    assert "after step 2" in page and "after step 1" not in page


def test_a_run_that_never_evaluated_ends_quietly(tmp_path: Path):
    run = RunReport(tmp_path, total_steps=1, console=False)
    run.finish()
    assert not (tmp_path / "summary.json").exists()


def test_without_matplotlib_a_run_ends_with_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "megatron_hybrid.train.plots", raising=False)
    import megatron_hybrid.train as room

    monkeypatch.delattr(room, "plots", raising=False)
    run = RunReport(tmp_path, total_steps=1)
    run.step(1, STEP)
    run.finish()
    assert "no plots drawn" in capsys.readouterr().out


def test_importing_the_report_costs_neither_torch_nor_matplotlib():
    code = (
        "import sys, megatron_hybrid.train.report; print({'torch', 'matplotlib', 'megatron.core'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout == "set()\n", done.stderr
