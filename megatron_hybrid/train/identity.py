"""What a run learns from and how: kept in its checkpoints, and held against the run that goes on from one.

    inputs     teacher, prompts, tokenizer, seed    others than the checkpoint's are refused, or allowed by a setting
    settings   the method's, Megatron's batches and steps, packages    differences are said in the log
    layout     TP, PP, VPP, CP, DP                                     likewise, with what cannot be exact any more

A file of prompts is known by all its bytes, generated ones by their setting. A teacher's checkpoint is known by the
files of its tensors: name, size, and 64 blocks of 4 KiB spread over each (all of a file up to 256 KiB). Training moves
every weight, so that tells any two apart that a run could confuse, at the cost of a few reads; a changed bit elsewhere
it does not see. What a server answers cannot be known. One rank reads; collective over the job.
"""

from __future__ import annotations

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.collectives import from_first
from megatron_hybrid.config import as_dict
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.checkpoint_io import checkpoint_folder
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.prompts.record_file import FILE_ENDINGS
from megatron_hybrid.teachers.spec import SELF
from megatron_hybrid.train.origin import versions
from megatron_hybrid.train.prepare import Prepared
from megatron_hybrid.train.updates import Updates
from megatron_hybrid.weighted import split_weighted

logger = logging.getLogger(__name__)

BLOCK_BYTES, NUM_BLOCKS = 4096, 64
_NO_MATTER = ("run_dir", "samples_interval", "gradient_norms_interval", "allow_other_inputs", "rollout_batch_size")
_INPUTS = ("prompts", "rollouts", "teacher_load", "teacher_store", "teacher_server")
_MEGATRON = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "train_iters", "weight_decay"),
    *("optimizer", "clip_grad", "global_batch_size", "micro_batch_size", "seq_length", "bf16", "fp16"),
)
_LAYOUT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "DP": "data_parallel_size",
}

Identity = dict[str, dict[str, Any]]
"""Plain values, for Megatron's checkpoint: `inputs` (each a digest and what to call it), `settings`, `layout`."""


def identify(prepared: Prepared, args: Namespace, *, own_teacher: bool, saved: Mapping[str, Any]) -> Identity:
    """This run's identity, the same on every rank; once it is known that it may go on from what was saved.

    own_teacher  the forward step brought its own
    saved        the arguments in the checkpoint that was resumed from; empty at a fresh start

    Raises:
        ConfigError: it learns from something else, and this is not allowed.
    """

    def on_one_rank() -> Identity:
        ours = _identity(prepared, args, own_teacher=own_teacher)
        theirs = saved.get("hybrid_identity")
        if theirs is not None:
            compare(theirs, ours, step=int(args.iteration), allowed=prepared.online.allow_other_inputs)
        elif saved:
            logger.warning("the checkpoint does not say what it learnt from: teacher and prompts are taken on trust")
        return ours

    return from_first(on_one_rank, (GroupView.of(dist.group.WORLD),))


def _identity(prepared: Prepared, args: Namespace, *, own_teacher: bool) -> Identity:
    config, online = prepared.config, prepared.online
    inputs = {
        "teacher": _teacher(online, prepared, own_teacher),
        "prompts": _prompts(online),
        "tokenizer": (tokenizer_fingerprint(prepared.tokenizer), str(args.tokenizer_model)),
        "seed": (str(args.seed), str(args.seed)),
    }
    settings = as_dict(config) | {k: v for k, v in as_dict(online).items() if k not in (*_NO_MATTER, *_INPUTS)}
    settings |= {name: getattr(args, name) for name in _MEGATRON}
    settings |= {f"version of {name}": version for name, version in versions().items()}
    layout = {axis: getattr(args, name) or 1 for axis, name in _LAYOUT.items()}
    return {"inputs": {name: list(pair) for name, pair in inputs.items()}, "settings": settings, "layout": layout}


def compare(theirs: Identity, ours: Identity, *, step: int, allowed: bool) -> None:
    """Says how the run that goes on differs from the one that saved.

    Raises:
        ConfigError: an input is another one, and that is not `allowed`.
    """
    was, now = theirs["inputs"], ours["inputs"]
    other = [
        f"{name} {was[name][1]} [{was[name][0][:8]}] -> {now[name][1]} [{now[name][0][:8]}]"
        for name in now
        if name in was and was[name][0] != now[name][0]
    ]
    if other and not allowed:
        raise ConfigError(
            f"the checkpoint of step {step} learnt from something else: {'; '.join(other)} (names, and digests of what "
            "they hold). Nothing in the curves would show it. Give the run what it had; or go on with "
            "--hybrid-allow-other-inputs; or start from the weights alone with --finetune."
        )
    if other:
        logger.warning("from step %d on the run learns from something else: %s", step, "; ".join(other))
    was, now = theirs["settings"], ours["settings"]
    changed = [f"{name} {was[name]} -> {now[name]}" for name in now if name in was and was[name] != now[name]]
    if changed:
        logger.warning("from step %d on with other settings: %s", step, ", ".join(changed))
    _say_where_prompts_go_on(was, now, step)
    if theirs["layout"] != ours["layout"]:
        collecting = not Updates(now["mini_batches"], now["ppo_epochs"]).is_first(step)
        logger.warning("%s", _other_layout(theirs["layout"], ours["layout"], step, collecting=collecting))


def _say_where_prompts_go_on(was: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    before, after = (
        Updates(s["mini_batches"], s["ppo_epochs"]).prompts_before(step, s["global_batch_size"] // s["group_size"])
        for s in (was, now)
    )
    if before != after:
        logger.warning(
            "prompts go on at position %d, where step %d of such batches is; the run had come to %d: those between are "
            "%s",
            after,
            step,
            before,
            "left out" if after > before else "asked again",
        )


def _other_layout(was: Mapping[str, int], now: Mapping[str, int], step: int, *, collecting: bool) -> str:
    said = " -> ".join(" x ".join(f"{axis} {size}" for axis, size in sizes.items()) for sizes in (was, now))
    lost = " The collection of rollouts that step falls into is sampled anew." if collecting else ""
    return (
        f"from step {step} on another layout: {said}. Weights, optimizer, prompts and the random numbers of responses "
        "go on as they were. Not to the bit: sums are made in another order, so numbers differ in their last digits, "
        f"and later by what comes of that. Megatron's own random states start anew where TP or PP differ.{lost}"
    )


def _prompts(online: OnlineConfig) -> tuple[str, str]:
    text = online.prompts or online.rollouts or ""
    known = [
        (share, _file_digest(Path(name)) if name.endswith(FILE_ENDINGS) else name)
        for share, name in split_weighted("prompts", text)
    ]
    return _digest(known), text


def _teacher(online: OnlineConfig, prepared: Prepared, own_teacher: bool) -> tuple[str, str]:
    if own_teacher:
        return "of the script", "of the script"
    if online.teacher_server is not None:
        return "a server", online.teacher_server
    if online.teacher_store is not None:
        return sampled_digest(Path(online.teacher_store), "*.safetensors"), online.teacher_store
    spec = prepared.teachers
    if spec is None:
        return "none", "none"
    known = {
        path: SELF if path == SELF else sampled_digest(checkpoint_folder(path), "*.distcp") for path in spec.sources
    }
    of_tasks = sorted((task, known[path]) for task, path in spec.source_of_task.items())
    return _digest([list(known.values()), list(spec.weights), of_tasks]), str(online.teacher_load)


def sampled_digest(folder: Path, pattern: str) -> str:
    """A digest of the names, the sizes and a part of the bytes of a folder's files, as the module says."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        whole = size <= BLOCK_BYTES * NUM_BLOCKS
        starts = [0] if whole else [block * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1) for block in range(NUM_BLOCKS)]
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(-1 if whole else BLOCK_BYTES))
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
