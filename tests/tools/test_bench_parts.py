"""Pieces of the benchmark by themselves: what counts as wrong, whose time is the unit, what installs the peers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PIP = """#!/bin/sh
# A python whose pip notes its calls, and cannot find one package.
case "$*" in
    *"-m pip install"*) ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
echo "$*" >>"$PIP_CALLS"
case "$*" in
    *verl==*) echo "ERROR: no matching distribution" >&2; exit 1 ;;
esac
while [ "$1" != --target ]; do shift; done
mkdir -p "$2"
"""


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def install(checkout: Path) -> tuple[Path, str]:
    variables = {"PATH": os.environ["PATH"], "HOME": str(checkout), "MEGATRON_HYBRID_CACHE": str(checkout / "cache")}
    variables |= {"REAL_PYTHON": sys.executable, "PIP_CALLS": str(checkout / "calls")}
    done = subprocess.run(
        [checkout / "tools" / "bench_peers.sh"], capture_output=True, text=True, check=True, env=variables, timeout=60
    )
    return Path(done.stdout.strip()), done.stderr


def test_peers_are_installed_once_without_requirements_and_one_that_fails_leaves_the_reason(tmp_path: Path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "bench_peers.sh", tmp_path / "tools")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    folder, said = install(tmp_path)
    assert "verl==" in said and "no matching distribution" in said
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "trl",
        "liger-kernel",
        "nvidia-modelopt",
        "ms-swift",
    }
    assert (folder / "verl.failed").read_text() == "ERROR: no matching distribution\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 5 and all("--no-deps --target" in call and "torch==" not in call for call in calls)
    assert install(tmp_path)[0] == folder
    assert len((tmp_path / "calls").read_text().splitlines()) == 6, "only what failed is tried again"


def test_a_peer_that_does_not_install_or_cannot_be_imported_is_a_row_with_the_reason(tools: None, tmp_path: Path):
    import bench_contenders
    import bench_peers

    (tmp_path / "verl.failed").write_text("ERROR: no matching distribution\n")
    bench_peers.use(tmp_path)
    notes = {who.name: who.note for who in bench_contenders.contenders() if who.forward is None}
    assert notes["verl vocab-parallel log-prob, entropy"] == "verl does not install: ERROR: no matching distribution"
    assert "ModuleNotFoundError" in notes["trl generalized_jsd_loss, beta 1"]


def test_a_wrong_gradient_is_marked_and_a_rounded_one_is_not(tools: None):
    from bench_contenders import Judge, Logits
    from bench_measure import KL, POLICY, Contender, Record, measure

    from megatron_hybrid.ops.reference import autograd_hybrid_loss

    problem = Logits.draw(4, 40, "fp32")

    def loss(p: Logits):
        return autograd_hybrid_loss(p.student, p.teacher, p.target).sum()

    def broken(p: Logits):
        raise RuntimeError("no such kernel\nand a long trace")

    right = Contender("right", KL, loss)
    taking_part = [right, Contender("for another job", POLICY, loss), Contender("broken", KL, broken)]
    records = measure(
        taking_part,
        problem,
        lambda who: Record(who.name, who.job.name, "logits", "fp32", 1, 40, 4),
        Judge(problem).error,
        1,
        unit_bytes=problem.unit_bytes,
        say=lambda text, cost: None,
    )
    assert [record.wrong for record in records] == [False, True, False]
    assert records[2].note == "failed: RuntimeError: no such kernel" and records[2].time_s is None
    records[0].error = float("nan")
    assert records[0].wrong


def test_a_rank_is_judged_on_its_columns_against_the_whole_gradient(tools: None):
    from bench_contenders import Judge, Logits
    from bench_measure import ALL, Contender

    from megatron_hybrid.ops.reference import reference_hybrid_loss

    whole = Logits.draw(3, 8, "fp32")
    gradient = reference_hybrid_loss(
        whole.student.detach(), whole.teacher, whole.target, advantage=whole.advantage
    ).gradient
    who = Contender("", ALL, None)
    shards = gradient.chunk(2, dim=-1)
    assert [Judge(whole, rank, 2).error(who, (shards[rank],)) for rank in (0, 1)] == [0, 0]
    assert Judge(whole, 0, 2).error(who, (shards[1],)) > 0.1
    mine = whole.shard(1, 2, None)
    assert mine.student.equal(whole.student[:, 4:]) and mine.student.is_leaf


def test_the_unit_of_time_is_our_fastest_with_at_least_the_same_job(tools: None):
    from bench_measure import ALL, KL, POLICY, Record
    from bench_report import unit_s

    def record(name: str, job: str, time_s: float, dtype: str = "fp32") -> Record:
        return Record(name, job, "logits", dtype, 1, 8, 2, forward_s=time_s, backward_s=0.0)

    rows = [record("ours, a", ALL.name, 3.0), record("ours, b", ALL.name, 2.0), record("ours, c", POLICY.name, 1.0)]
    rows += [record("theirs", KL.name, 0.5), record("ours, b", ALL.name, 0.1, dtype="bf16")]
    assert unit_s(rows[3], rows) == 2 and unit_s(rows[2], rows) == 1
