"""No file of a checkpoint runs code, and one that is missing, cut off or altered is named, wherever it is read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_hybrid.checkpoint.folders import hf_folder_to_megatron, megatron_folder_to_hf, prune_megatron_folder
from megatron_hybrid.checkpoint.inspect import inspect_folder
from megatron_hybrid.errors import DataError
from megatron_hybrid.mcore.checkpoint_io import load_megatron_args, load_megatron_state
from megatron_hybrid.mcore.plain_reading import plain_data_only
from tests.checkpoint.tiny_llama import make_folder
from tests.planted import Planted

READERS: dict[str, Callable[[Path], Any]] = {
    "arguments of a teacher": load_megatron_args,
    "whole tensors": load_megatron_state,
    "inspection": inspect_folder,
    "conversion": lambda folder: megatron_folder_to_hf(folder, folder / "hf"),
    "pruning": lambda folder: prune_megatron_folder(folder, folder / "short", drop=[0]),
}
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_folder(folder / "hf", num_layers=1)
    hf_folder_to_megatron(folder / "hf", folder / "megatron")
    return folder / "megatron"


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for each test to break; no checksums, so that what is behind them is tried."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "release" / "integrity.json").unlink()
    return tmp_path / "copy"


def plant_in_index(checkpoint: Path, ran: Path) -> None:
    path = checkpoint / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.planner_data = {"a": Planted(ran)}
    path.write_bytes(pickle.dumps(index))


def plant_in_old_arguments(checkpoint: Path, ran: Path) -> None:
    torch.save({"args": Planted(ran)}, checkpoint / "release" / "common.pt")


def plant_in_arguments(checkpoint: Path, ran: Path) -> None:
    """Where the format of today keeps them: in a shard, at a place that the index knows."""
    inner = checkpoint / "release"
    index = pickle.loads((inner / ".metadata").read_bytes())
    (place,) = (key for key in index.storage_data if key.fqn.startswith("common_state"))
    torch.save([{"args": Planted(ran)}], inner / "__9_9.distcp")
    info = index.storage_data[place]
    info.relative_path, info.offset, info.length = "__9_9.distcp", 0, (inner / "__9_9.distcp").stat().st_size
    (inner / ".metadata").write_bytes(pickle.dumps(index))


PLACES = {"index": plant_in_index, "common.pt": plant_in_old_arguments, "arguments": plant_in_arguments}
every_place = pytest.mark.parametrize("plant", PLACES.values(), ids=PLACES)


@every_reader
@every_place
def test_what_is_planted_never_runs(checkpoint, tmp_path, plant, reader):
    plant(checkpoint, tmp_path / "ran")
    with pytest.raises(DataError, match="cannot be read"):
        reader(checkpoint)
    assert not (tmp_path / "ran").exists(), "a checkpoint must not run code"


def test_megatron_and_torch_alone_would_run_it(checkpoint, tmp_path):
    """The reason for all of this; where it ends, so may `plain_data_only`."""
    from megatron.core import dist_checkpointing

    plant_in_arguments(checkpoint, tmp_path / "arguments ran")
    with pytest.raises(Exception):  # noqa: B017  whatever they make of an open file
        dist_checkpointing.load_common_state_dict(str(checkpoint / "release"))["args"].num_layers  # noqa: B018
    assert (tmp_path / "arguments ran").exists()
    plant_in_index(checkpoint, tmp_path / "index ran")
    FileSystemReader(checkpoint / "release").read_metadata()
    assert (tmp_path / "index ran").exists()


def test_torchs_reader_is_its_own_again_behind_the_block(whole):
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    before = filesystem.pickle, DefaultLoadPlanner.load_bytes
    with plain_data_only(), plain_data_only():
        assert (filesystem.pickle, DefaultLoadPlanner.load_bytes) != before
        assert filesystem.pickle.dumps is pickle.dumps, "what writes goes on"
    assert (filesystem.pickle, DefaultLoadPlanner.load_bytes) == before


def shard(checkpoint: Path) -> Path:
    return max((checkpoint / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("reader", [READERS["whole tensors"], READERS["conversion"]], ids=["tensors", "conversion"])
def test_a_shard_that_is_cut_off_or_missing_is_named(checkpoint, reader):
    broken = shard(checkpoint)
    size = broken.stat().st_size
    cut(broken)
    with pytest.raises(DataError, match=f"{broken} is cut off: it has {size - 7} bytes of {size}. Copy it again"):
        reader(checkpoint)
    broken.unlink()
    with pytest.raises(DataError, match=f"{broken} is missing"):
        reader(checkpoint)


@every_reader
def test_an_index_that_is_cut_off_is_named(checkpoint, reader):
    cut(checkpoint / "release" / ".metadata")
    with pytest.raises(DataError, match=r"release/\.metadata is broken"):
        reader(checkpoint)


@every_reader
@pytest.mark.parametrize("word", ["", "12x", "-3", "../../elsewhere", "9" * 5000])
def test_a_tracker_that_names_no_iteration_is_refused(checkpoint, reader, word):
    (checkpoint / "latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(DataError, match="should say which iteration is the newest"):
        reader(checkpoint)


def test_an_index_cannot_lead_out_of_its_folder(checkpoint, tmp_path):
    path = checkpoint / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../../{info.relative_path}"
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(DataError, match="names the file '../../__0_0.distcp', which is not in the checkpoint's folder"):
        load_megatron_state(checkpoint)


def test_one_altered_bit_of_a_converted_checkpoint_is_told_by_its_checksum(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    broken = shard(tmp_path / "copy")
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    with pytest.raises(DataError, match=rf"{broken} is missing or not what was written \(1 of \d files"):
        load_megatron_state(tmp_path / "copy")
    (broken.parent / "integrity.json").write_text('{"files": []}')
    with pytest.raises(DataError, match="integrity.json holds no checksums"):
        load_megatron_state(tmp_path / "copy")


def test_the_checksums_are_those_of_megatron(whole):
    """--verify-integrity of a run that loads a converted checkpoint looks for this."""
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    verify_integrity_manifest(str(whole / "release"))
    assert json.loads((whole / "release" / "integrity.json").read_text())["algorithm"] == "sha256"


def break_weights(folder: str, how: str) -> tuple[str, bool]:
    """On two ranks: what loading the weights of a broken checkpoint says, and whether something ran."""
    import torch.distributed as dist

    from megatron_hybrid.mcore.plain_reading import write_checksums
    from megatron_hybrid.mcore.second_model import load_weights, save_weights
    from tests.tiny import megatron, start

    inner, ran = Path(folder, how), Path(folder, f"{how} ran")
    with megatron(num_layers=1, tensor_model_parallel_size=2) as args:
        model = start(args)
        save_weights(model, inner)
        load_weights(model, inner)
        if dist.get_rank() == 0:
            if how == "altered":
                write_checksums(inner)
                first = sorted(inner.glob("*.distcp"))[0]
                first.write_bytes(first.read_bytes()[::-1])
            elif how == "cut":
                cut(sorted(inner.glob("*.distcp"))[0])
            else:
                (inner / "release").symlink_to(inner)
                PLACES[how](inner, ran)
        dist.barrier()
        try:
            load_weights(model, inner)
        except DataError as error:
            return str(error), ran.exists()
    return "nothing", ran.exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("altered", "__0_0.distcp is missing or not what was written"),
        ("cut", "__0_0.distcp is cut off"),
        ("index", ".metadata is broken"),
        ("arguments", "weights_only"),
    ],
)
def test_every_rank_of_a_teacher_says_so_and_none_runs_it(rank_pool, tmp_path, how, message):
    for said, ran in rank_pool(2, init=False).run(break_weights, str(tmp_path), how):
        assert message in said and not ran
