"""A disk that is full, read-only or gone, a broken TensorBoard or wandb: said once, counted, and the run goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.train import journal, outlets
from megatron_hybrid.train.outlets import JournalOutlet, Outlet
from megatron_hybrid.train.report import RunReport
from megatron_hybrid.train.samples import Sample
from tests.full_disk import SmallDisk, small_disk

ROOT = Path(__file__).parents[2]
STEP = {"critic/score/mean": 0.5, "timing_s/step": 1.0}
ROW = Sample("3 + 4?", "seven", "7", 1.0, (0.1,))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as found:
        yield found


def steps(path: Path) -> list[int]:
    """Strict: a half line in the middle would be an error."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def long_record(step: int) -> dict[str, Any]:
    return {"step": step, "text": "x" * 3000}  # no page of 4096 bytes holds two: a full disk takes a part of a line


def test_lines_wait_for_a_full_disk_and_are_appended_in_order(disk: SmallDisk, caplog):
    outlet = JournalOutlet(disk.path / "metrics.jsonl")
    for step in range(1, 7):
        if step == 3:
            disk.fill()
        if step == 6:
            disk.free()
        outlet.append(long_record(step))
        if step == 5:
            assert steps(outlet.path) == [1, 2]
            assert [record["step"] for record in outlet.read()] == [1, 2, 3, 4, 5]
    assert steps(outlet.path) == [1, 2, 3, 4, 5, 6]
    first, second = warnings(caplog)
    assert first.startswith("metrics.jsonl cannot be written (OSError: [Errno 28] No space left on device")
    assert first.endswith("wait in memory for it. Training goes on; this is said once.")
    assert second == "metrics.jsonl can be written again: 3 lines that waited are in it, 0 were lost meanwhile"
    assert outlet.summary == "metrics.jsonl: 3 calls failed, 0 lines are missing in it"


def test_a_full_disk_keeps_no_half_line(disk: SmallDisk):
    path = disk.path / "metrics.jsonl"
    journal.append(path, {"step": 0})
    disk.fill()
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        journal.append(path, *[long_record(step) for step in range(3)])
    assert path.read_bytes() == before


def test_a_half_line_that_nobody_could_cut_off_is_cut_off_by_the_next_append(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal.append(path, {"step": 0})
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "text": "' + b"x" * 10_000)
    journal.append(path, {"step": 2})
    assert steps(path) == [0, 2]


def test_lines_wait_for_a_read_only_folder_too(disk: SmallDisk, caplog):
    outlet = JournalOutlet(disk.path / "metrics.jsonl")
    outlet.append({"step": 1})
    disk.read_only()
    outlet.append({"step": 2})
    disk.read_only(False)
    outlet.append({"step": 3})
    assert steps(outlet.path) == [1, 2, 3]
    assert "Read-only file system" in warnings(caplog)[0]


def test_only_so_many_lines_wait_and_those_that_are_lost_are_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(outlets, "MOST_WAITING_BYTES", 10_000)
    outlet = JournalOutlet(tmp_path / "missing" / "metrics.jsonl")
    for step in range(10):
        outlet.append(long_record(step))
    assert outlet.lost == 7
    outlet.path.parent.mkdir()
    outlet.append({"step": 10})
    assert steps(outlet.path) == [7, 8, 9, 10]
    assert outlet.summary == "metrics.jsonl: 10 calls failed, 7 lines are missing in it"


def test_an_outlet_that_keeps_failing_is_said_once(caplog):
    outlet = Outlet("it", "what it had is lost")
    assert [outlet.write(int, text) for text in ("1", "x", "2", "y", "z")] == [1, None, 2, None, None]
    assert outlet.failures == 3
    assert sum("cannot be written" in text for text in warnings(caplog)) == 1


def whole_report(run: RunReport, first: int, last: int) -> None:
    """All that a run asks of its report."""
    for step in range(first, last + 1):
        run.step(step, STEP)
        run.samples(step, [ROW, ROW])
    run.evaluation(last, {"val/score": 0.5})


def test_a_run_whose_folder_vanishes_goes_on_and_ends_by_saying_what_is_missing(tmp_path: Path, caplog, capsys):
    run = RunReport(tmp_path / "run", total_steps=4)
    run.config({"a": 1})
    whole_report(run, 1, 2)
    shutil.rmtree(tmp_path / "run")
    whole_report(run, 3, 4)
    run.parts({"layers": "none"})
    run.finish()
    run.close()
    assert [text.partition(" cannot be written")[0] for text in warnings(caplog)] == [
        "metrics.jsonl",
        "samples.jsonl",
        "the run folder",
    ]
    printed = capsys.readouterr().out
    assert "step 4/4" in printed
    assert "metrics.jsonl: 3 calls failed, 3 lines are missing in it" in printed


def test_a_run_on_a_full_disk_has_all_its_lines_once_there_is_room(disk: SmallDisk, caplog):
    run = RunReport(disk.path, total_steps=4, console=False)
    whole_report(run, 1, 1)
    disk.fill()
    whole_report(run, 2, 3)
    disk.free()
    whole_report(run, 4, 4)
    assert steps(disk.path / "metrics.jsonl") == [1, 1, 2, 3, 3, 4, 4]
    assert steps(disk.path / "samples.jsonl") == [1, 1, 2, 2, 3, 3, 4, 4]
    assert "after step 4" in (disk.path / "samples.md").read_text()
    assert not list(disk.path.glob("*.tmp"))


def test_an_output_that_takes_nothing_more_ends_no_run(tmp_path: Path):
    code = """
import sys
from megatron_hybrid.train.report import RunReport
run = RunReport(sys.argv[1], total_steps=300)
for step in range(1, 301):
    run.step(step, {"critic/score/mean": 0.5})
run.finish()
run.close()
sys.stdout = None  # nothing more to flush at the end
"""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-u", "-c", code, tmp_path], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("standard output cannot be written") == 1
    assert len(steps(tmp_path / "metrics.jsonl")) == 300


def test_a_real_tensorboard_writer_on_a_full_disk_ends_no_step_of_ours_or_megatrons(disk: SmallDisk, tmp_path, caplog):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    (disk.path / "tb").mkdir()
    writer = tensorboard.SummaryWriter(str(disk.path / "tb"), max_queue=1, flush_secs=0)
    run = RunReport(tmp_path / "run", total_steps=1, tensorboard=writer, console=False)
    disk.fill()
    for step in range(1, 200):
        run.step(step, STEP)
        writer.add_scalar("learning-rate", 0.1, step)  # as Megatron does, with the same writer
        writer.flush()
    run.samples(1, [ROW])
    assert [text.partition(" cannot")[0] for text in warnings(caplog)] == ["TensorBoard"]
    assert len(steps(tmp_path / "run" / "metrics.jsonl")) == 199
    run.close()
    with pytest.raises(OSError, match="No space left"):
        writer.add_scalar("learning-rate", 0.1, 200)


def test_a_closed_tensorboard_writer_ends_no_step(tmp_path: Path, caplog):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(tmp_path / "tb"))
    writer.file_writer.event_writer._async_writer.close()  # as a writer whose thread has ended
    RunReport(tmp_path / "run", total_steps=1, tensorboard=writer, console=False).step(1, STEP)
    (text,) = warnings(caplog)
    assert text.startswith("TensorBoard cannot be written")


def test_a_wandb_function_that_wandb_replaces_meanwhile_stays_wandbs(tmp_path: Path):
    class Wandb:
        def log(self, values: dict[str, float], step: int) -> None:
            raise ConnectionError("the service is gone")

        def finish(self) -> None:
            self.log = lambda values, step: None  # as wandb does, back to its state before init

    wandb: Any = Wandb()
    run = RunReport(tmp_path, total_steps=1, wandb=wandb, console=False)
    run.step(1, STEP)
    wandb.finish()
    ours = wandb.log
    run.close()
    assert wandb.log is ours
    assert "finish" not in vars(wandb)


@pytest.mark.parametrize("fault", [pytest.param("folder is gone", marks=pytest.mark.slow), "service is killed"])
def test_real_wandb_that_breaks_ends_no_step(tmp_path: Path, fault: str):
    pytest.importorskip("wandb")
    code = """
import os, shutil, sys, psutil, wandb
from megatron_hybrid.train.report import RunReport
folder, fault = sys.argv[1:]
wandb.init(project="p", name="n", dir=folder + "/wandb", settings=wandb.Settings(console="off"))
run = RunReport(folder + "/run", total_steps=60, wandb=wandb, console=False)
run.step(1, {"actor/kl_loss": 0.5})
if fault == "folder is gone":
    shutil.rmtree(folder + "/wandb")
else:
    for child in psutil.Process().children(recursive=True):
        child.kill()
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
for step in range(2, 61):
    run.step(step, {"actor/kl_loss": 0.25, "text": float(step)})
    wandb.log({"learning-rate": 0.1}, step)
wandb.finish()
run.finish()
run.close()
os._exit(0)  # wandb's own hook at exit is not ours
"""
    (tmp_path / "wandb").mkdir()
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, fault], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert len(steps(tmp_path / "run" / "metrics.jsonl")) == 60
    said = done.stderr.count("wandb cannot be written")
    assert said == (1 if fault == "service is killed" else 0), done.stderr  # an open file outlives its folder
