"""The process that makes one reward for a run: prompts and responses in, scores out, until the run ends.

    run -> (Prompt, response), pickled -> reward -> {"score": ...} or {"error": ...} or {"broken": ...}, JSON -> run

What comes from here is never unpickled by the run. Started by `worker_pool.py` as a new interpreter: nothing of the
run's threads, device or file descriptors is in it. No torch, unless the reward brings it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from megatron_hybrid.errors import DataError, HybridError, RewardError
from megatron_hybrid.rewards.base import Reward
from megatron_hybrid.rewards.by_name import reward_by_name

LONGEST_TEXT = 100_000
"""Characters of an error that travel."""
_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Serves the run at the other end of a socket, which is the process `parent`."""
    leave_with(parent)
    faulthandler.register(signal.SIGUSR1)  # asked for the stack before it is ended
    run = Connection(descriptor)
    name, file_reward, limits = run.recv()
    if math.isfinite(limits.memory_gib):
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    try:
        reward = reward_by_name(name, file_reward=file_reward, limits=limits)
    except HybridError as error:
        _say(run, {"broken": str(error)})
        return
    _say(run, {})
    while True:
        try:
            prompt, response = run.recv()
        except (EOFError, ConnectionError):
            return
        answer = _judge(reward, prompt, response)
        sys.stdout.flush()
        _say(run, answer)


def leave_with(parent: int) -> None:
    """This process ends when its parent has, even in code that never returns; and is the first to go for memory."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        sys.exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _judge(reward: Reward, prompt: Any, response: str) -> dict[str, Any]:
    try:
        return {"score": float(reward.score(prompt, response))}
    except (RewardError, DataError) as error:
        return {"error": str(error)}
    except SystemExit as error:
        return {"error": f"the reward {reward.name} called exit({error.code!r}) on prompt {prompt.prompt_id}."}
    except BaseException:
        return {"broken": traceback.format_exc()}  # our own mistake, or the library's


def _say(run: Connection, answer: dict[str, Any]) -> None:
    short = {key: value[:LONGEST_TEXT] if isinstance(value, str) else value for key, value in answer.items()}
    with contextlib.suppress(OSError):  # nobody listens any more
        run.send_bytes(json.dumps(short).encode())
