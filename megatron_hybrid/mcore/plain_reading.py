"""Checkpoints are read as data: nothing in them is run, and what is broken in them is named.

torch's reader unpickles a checkpoint's index (`.metadata`) and its small objects (arguments, random states) as they
are, so whoever wrote the folder could run code in the job that loads it. Within `plain_data_only()` an index may name
the few classes that an index is made of, and objects are read as Megatron reads its older common.pt, by weights_only.
That holds for the whole process, because Megatron reads in many places (--load, --use-checkpoint-args); it is undone on
exit and may be nested.

    reading(folder)      the same around a read of our own; whatever fails is a DataError with the broken file in it
    write_checksums      sha256 of every file of a folder, in Megatron's own form (integrity.json, --verify-integrity)
    require_unaltered    holds a folder against them, where it has some

What is recognised of a checkpoint: missing and cut-off files always, by their lengths in the index; altered ones by
checksums. Not here: Megatron's own reading, whose errors are its own.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megatron_hybrid.errors import DataError, HybridError

_INDEX_FILE = ".metadata"
_CHECKSUMS_FILE = "integrity.json"
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""What the index of a checkpoint is made of, older versions' too; and torch's dtypes."""
_SHOWN = 400


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors is made of: code could run")


class _PickleOfIndexes:
    """What stands for the module `pickle` in torch's reader of checkpoints."""

    @staticmethod
    def load(file: Any) -> Any:
        index = _IndexUnpickler(file).load()
        for name in {info.relative_path for info in index.storage_data.values()}:
            if name != PurePath(name).name:
                raise pickle.UnpicklingError(f"it names the file {name!r}, which is not in the checkpoint's folder")
        return index

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Within: torch's checkpoints are read without running what they hold."""
    if isinstance(filesystem.pickle, _PickleOfIndexes):
        yield
        return
    load_bytes = DefaultLoadPlanner.load_bytes

    def checked(self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # what follows reads them again, and would run them
        value.seek(0)
        load_bytes(self, read_item, value)

    torch_reader: Any = filesystem
    planner: Any = DefaultLoadPlanner
    torch_reader.pickle, planner.load_bytes = _PickleOfIndexes(), checked
    try:
        yield
    finally:
        torch_reader.pickle, planner.load_bytes = pickle, load_bytes


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within: `folder`, that of the tensors, is read as plain data.

    Raises:
        DataError: whatever is wrong with it, its broken file by name where that can be told.
    """
    try:
        with plain_data_only():
            yield
    except HybridError:
        raise
    except (Exception, CheckpointException) as error:  # torch's own is a BaseException
        raise DataError(
            f"the checkpoint {folder} cannot be read: {_broken_file(folder) or _cause(error)}. Copy it again, or use "
            "another; what it holds beside tensors is plain data, and nothing else is loaded."
        ) from error


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error)[:_SHOWN]}"


def file_ends(index: Any) -> list[tuple[str, int]]:
    """Names of a checkpoint's files and the least bytes that each must have, sorted; index: its `.metadata`."""
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return sorted(ends.items())


def _broken_file(folder: Path) -> str | None:
    """Which file is missing, cut off or no index; None where lengths and index are in order."""
    path = folder / _INDEX_FILE
    try:
        with open(path, "rb") as file:
            index = _PickleOfIndexes.load(file)
    except FileNotFoundError:
        return f"{path} is missing"
    except Exception as error:  # a pickle of anything fails in any way
        return f"{path} is broken ({type(error).__name__}: {str(error)[:_SHOWN]})"
    for name, end in file_ends(index):
        shard = folder / name
        if not shard.is_file():
            return f"{shard} is missing"
        if (size := shard.stat().st_size) < end:
            return f"{shard} is cut off: it has {size} bytes of {end}"
    return None


def write_checksums(folder: Path) -> None:
    """Leaves the sha256 of every file of a checkpoint in its folder."""
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != _CHECKSUMS_FILE}
    (folder / _CHECKSUMS_FILE).write_text(json.dumps({"algorithm": "sha256", "files": sums}, indent=2) + "\n")


def require_unaltered(folder: Path, *, together: bool) -> None:
    """Raises DataError where a file is not what the folder's checksums say; a folder without any is not looked at.

    together  all ranks call, each reads a part of the files, and all raise. Collective: who found what, pickled
    """
    path = folder / _CHECKSUMS_FILE
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        sums = {PurePath(name).name: str(value) for name, value in known["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds no checksums ({error!r}): delete it, or copy the checkpoint again.") from error
    size, rank = (dist.get_world_size(), dist.get_rank()) if together and dist.is_initialized() else (1, 0)
    altered = [name for name in sorted(sums)[rank::size] if _sha256(folder / name) != sums[name]]
    if size > 1:
        parts: list[list[str]] = [[] for _ in range(size)]
        dist.all_gather_object(parts, altered)
        altered = sorted(sum(parts, []))
    if altered:
        shown = ", ".join(str(folder / name) for name in altered[:4])
        raise DataError(
            f"{shown}{', ...' if len(altered) > 4 else ''} is missing or not what was written ({len(altered)} of "
            f"{len(sums)} files differ from the sha256 in {_CHECKSUMS_FILE}): copy the checkpoint again."
        )


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
