"""Which checkpoint of a folder is the newest whole one, whatever moment the last run died in.

    FOLDER/latest_checkpointed_iteration.txt    Megatron writes it last: what it names is whole, as a rule
    FOLDER/iter_<steps>/metadata.json           likewise the last file of a checkpoint

Not by that rule: the tracker itself is emptied before it is written (a kill between, or a full disk, leaves it empty,
and Megatron ends); and a run that went back to an earlier step writes over a later checkpoint that is still named.
So a checkpoint loses its mark before it is written over, and where the tracker names none that is whole, the newest
whole one takes its place. Not here: the content of files, of which only the sizes are looked at.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from megatron_hybrid.errors import DataError
from megatron_hybrid.mcore.checkpoint_io import TRACKER

logger = logging.getLogger(__name__)

_MARK = "metadata.json"


def begin_over(folder: Path) -> None:
    """To be called before a checkpoint is written into `folder`: what an earlier run left there is no longer whole."""
    (folder / _MARK).unlink(missing_ok=True)


def settle(checkpoints: str | Path, *, writes: bool) -> None:
    """Lets the tracker name a whole checkpoint; to be called before Megatron reads it.

    writes  this process is the one of the job that corrects the file

    Raises:
        DataError: the tracker names nothing that is whole, and neither is anything else; or a file of what it names is
            shorter than it was written.
    """
    checkpoints = Path(checkpoints)
    tracker = checkpoints / TRACKER
    if not tracker.exists():
        return
    named = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if named == "release":
        return
    if named.isdecimal() and any((checkpoints / f"iter_{int(named):07d}").glob("mp_rank_*")):
        return  # Megatron's older format, which has no mark
    if named.isdecimal() and is_marked(folder := checkpoints / f"iter_{int(named):07d}"):
        refuse_cut_files(folder)
        return
    whole = sorted(folder for folder in checkpoints.glob("iter_*") if is_marked(folder))
    what = (
        f"{tracker} names {f'step {named}, which is not whole' if named.isdecimal() else f'no step ({named[:20]!r})'}"
    )
    if not whole:
        raise DataError(
            f"{what}, and no other checkpoint in {checkpoints} is: a run died while it wrote its first, or another "
            "program has changed the folder. Remove the tracker to start anew, or give another --load."
        )
    refuse_cut_files(whole[-1])
    step = int(whole[-1].name.removeprefix("iter_"))
    logger.warning("%s: a run died while it saved. This one goes on from step %d, the newest that is whole", what, step)
    if writes:
        correct = tracker.with_name(f".{TRACKER}.{os.getpid()}")
        correct.write_text(str(step), encoding="utf-8")
        correct.replace(tracker)


def is_marked(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, and nobody has begun to write over it."""
    try:
        return bool(json.loads((folder / _MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def refuse_cut_files(folder: Path) -> None:
    """Raises DataError where a file of a torch_dist checkpoint is missing, or ends before what was written into it."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_hybrid.mcore.plain_reading import file_ends, reading

    if not (folder / ".metadata").exists():
        raise DataError(
            f"{folder / '.metadata'} is missing, which says where the tensors of the checkpoint lie: it cannot be "
            f"read. {_instead(folder)}"
        )
    with reading(folder):
        index = FileSystemReader(folder).read_metadata()
    for name, end in file_ends(index):
        file = folder / name
        size = file.stat().st_size if file.exists() else 0
        if size < end:
            raise DataError(
                f"{file} has {size} bytes of the {end} that were written: the checkpoint was whole once, so a disk or "
                f"a copy has lost the rest, and what else it lost cannot be known. {_instead(folder)}"
            )


def _instead(folder: Path) -> str:
    return f"Restore it, or remove {folder}: then the newest whole checkpoint beside it is used."
