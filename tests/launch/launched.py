"""Online runs as a user starts them: processes of their own under `python -m torch.distributed.run`, real signals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.online_jobs import ONLINE, steps, with_teacher
from tests.tiny import command_line

ROOT = Path(__file__).parents[2]
TRAIN = ["-m", "megatron_hybrid.cli.train"]

SAVES_EVERY = 4
STEPS = 12
CHECKPOINTED = {"train_iters": STEPS, "lr_decay_iters": STEPS, "save_interval": SAVES_EVERY}


def settings(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """A run of twelve steps that reports into `name`, with its checkpoints beside it, from which it goes on."""
    own = {"save": f"{folder}/{name}-checkpoints", "load": f"{folder}/{name}-checkpoints"}
    return with_teacher(folder, name, **CHECKPOINTED) | own | more


def flags(folder: Path, name: str, **more: Any) -> list[str]:
    """The same on the command line of the program."""
    data = {"tokenizer_model": f"{folder}/tokenizer", "hybrid_prompts": f"{folder}/prompts.jsonl"}
    return command_line(**(ONLINE | data | settings(folder, name, **more)))[1:]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher or Slurm has put there, on the loopback interface."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return kept | quiet | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | more


def torchrun(log: Path, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
    """An agent; what it and its ranks say goes to `log`."""
    with open(log, "wb") as file:
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        own_store = environment(**{"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | more)
        return subprocess.Popen(command, cwd=ROOT, env=own_store, stdout=file, stderr=subprocess.STDOUT)


def rank_process(agents: Sequence[subprocess.Popen[bytes]], rank: int) -> psutil.Process:
    """The process of a rank below the agents."""
    children = [child for agent in agents for child in psutil.Process(agent.pid).children()]
    (found,) = (child for child in children if child.environ().get("RANK") == str(rank))
    return found


def wait_for(
    what: str, happened: Callable[[], bool], log: Path, *, alive: Sequence[subprocess.Popen[bytes]] = ()
) -> None:
    """Until it has; an error shows the end of the log, and comes at once where one of `alive` has ended."""
    deadline = time.monotonic() + 200
    while not happened():
        ended = [process.returncode for process in alive if process.poll() is not None]
        late = time.monotonic() > deadline
        assert not ended and not late, f"{what}: ended with {ended}, or not within 200 s\n{log.read_text()[-5000:]}"
        time.sleep(0.1)


def steps_done(folder: Path, name: str) -> int:
    """The last step that the run has reported; 0 before it has."""
    journal = folder / name / "metrics.jsonl"
    return int(steps(folder, name)[-1]["step"]) if journal.exists() and journal.stat().st_size else 0
