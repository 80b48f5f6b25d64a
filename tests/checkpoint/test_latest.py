"""The newest whole checkpoint of a folder is found, whatever moment the last run died in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_hybrid.checkpoint.latest import begin_over, settle
from megatron_hybrid.errors import DataError
from megatron_hybrid.mcore.checkpoint_io import TRACKER
from tests.online_jobs import make_tokenizer, run


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory) -> Path:
    """Checkpoints of two steps, as a run leaves them."""
    folder = tmp_path_factory.mktemp("latest")
    make_tokenizer(folder / "tokenizer")
    (folder / "prompts.jsonl").write_text('{"prompt": "w1", "answer": "w2"}\n')
    flags = {"train_iters": 2, "save": f"{folder}/saved", "save_interval": 1, "hybrid_imitation_weight": 0}
    rank_pool(1, init=False).run(run, str(folder), flags)
    return folder / "saved"


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def named(checkpoints: Path) -> str:
    return (checkpoints / TRACKER).read_text()


def test_a_whole_checkpoint_is_left_as_it_is(checkpoints):
    settle(checkpoints, writes=True)
    assert named(checkpoints) == "2"
    assert not list(checkpoints.glob(".latest*"))


@pytest.mark.parametrize("tracker", ["", "\0\0", "3"])
def test_a_tracker_that_names_nothing_whole_is_set_to_the_newest_that_is(checkpoints, tracker, caplog):
    (checkpoints / TRACKER).write_text(tracker)
    (checkpoints / "iter_0000003").mkdir()
    shutil.copy(checkpoints / "iter_0000002" / "__0_0.distcp", checkpoints / "iter_0000003")
    settle(checkpoints, writes=False)
    assert named(checkpoints) == tracker, "one process of a job writes"
    settle(checkpoints, writes=True)
    assert named(checkpoints) == "2"
    assert "goes on from step 2" in caplog.text


def test_a_checkpoint_that_is_being_written_over_is_not_whole(checkpoints):
    begin_over(checkpoints / "iter_0000002")
    begin_over(checkpoints / "iter_0000009")
    settle(checkpoints, writes=True)
    assert named(checkpoints) == "1"


def test_half_a_mark_is_none(checkpoints):
    (checkpoints / "iter_0000002" / "metadata.json").write_text('{"sharded_back')
    settle(checkpoints, writes=True)
    assert named(checkpoints) == "1"


def test_a_file_that_has_lost_its_end_is_named_with_both_sizes(checkpoints):
    file = checkpoints / "iter_0000002" / "__0_0.distcp"
    size = file.stat().st_size
    with open(file, "r+b") as cut:
        cut.truncate(size // 2)
    with pytest.raises(DataError, match=rf"__0_0\.distcp has {size // 2} bytes of the {size} that were written"):
        settle(checkpoints, writes=True)
    file.unlink()
    with pytest.raises(DataError, match=r"__0_0\.distcp has 0 bytes of the"):
        settle(checkpoints, writes=True)
    assert named(checkpoints) == "2"


def test_without_a_whole_one_the_run_does_not_begin_anew_by_itself(checkpoints):
    for folder in checkpoints.glob("iter_*"):
        begin_over(folder)
    with pytest.raises(DataError, match="names step 2, which is not whole, and no other checkpoint"):
        settle(checkpoints, writes=True)


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path):
    settle(tmp_path, writes=True)
    settle(tmp_path / "none", writes=True)
    assert not list(tmp_path.iterdir())
