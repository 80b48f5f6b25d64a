"""A reward made in processes of its own, so that whatever happens in it happens to them.

    prompts, responses -> one of `size` processes each (`worker.py`) -> score, or RewardError

A process that takes too long for a response, or dies of one, is ended with its children and replaced by a new one; the
others are used again. Each has limited memory, and what it prints goes to a file. That is for a reward's mistakes, not
its malice: code of the user's own is trusted.
multiprocessing's own pools are not used: none of them can end a call that hangs, and their processes import the run's
main module, Megatron included.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Pipe
from queue import SimpleQueue
from typing import Any

from megatron_hybrid.errors import ConfigError, RewardError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import Score
from megatron_hybrid.rewards.sandbox import Limits
from megatron_hybrid.rewards.worker_output import WorkerOutput
from megatron_hybrid.servers.json_server import run_all

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0
"""Importing a user's module may load a model."""
_LONGEST_ANSWER_BYTES = 1 << 20


class WorkerPool:
    """A `BatchReward` of one reward.

    Args:
        asked_as: what the settings call it.
        name: what metrics call it.
        size: processes, started when there is something to score.
        file_reward: see `reward_by_name`.
        limits: of a process, for one response.
        output: where what they print goes.
    """

    main_thread_only = False

    def __init__(
        self, asked_as: str, name: str, *, size: int, file_reward: str, limits: Limits, output: WorkerOutput
    ) -> None:
        self.name = name
        self._size = size
        self._how = (asked_as, file_reward, limits)
        self._limits = limits
        self._output = output
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(size):
            self._idle.put(None)
        # A worker ends with the thread that started it (the kernel's PR_SET_PDEATHSIG means threads): this one stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reward workers")
        self._running: set[_Worker] = set()
        weakref.finalize(self, _end_all, self._running)

    def score_all(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """A score per response, or a RewardError: what the reward raised, or what its process died of."""
        jobs = [partial(self._score, *pair) for pair in zip(prompts, responses, strict=True)]
        return run_all(jobs, at_once=self._size)

    def _score(self, prompt: Prompt, response: str) -> Score:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
            return self._judge(worker, prompt, response)
        finally:
            if worker is not None and worker.ended:
                self._running.discard(worker)
                worker = None
            self._idle.put(worker)

    def _start(self) -> _Worker:
        worker = self._starter.submit(_Worker, self._how, self._output.write_end()).result()
        self._running.add(worker)
        ready = worker.answer(_START_TIMEOUT_S)
        if ready != {}:
            code = worker.end()
            self._running.discard(worker)
            silent = f"it did not start within {_START_TIMEOUT_S:g} s" if code is None else f"it ended with code {code}"
            said = ready.get("broken", "see there") if ready else silent
            raise ConfigError(
                f"a process for the reward {self.name} cannot be made: {said}. What it printed is in "
                f"{self._output.file}; --hybrid-reward-memory is {self._limits.memory_gib:g} GiB of address space."
            )
        return worker

    def _judge(self, worker: _Worker, prompt: Prompt, response: str) -> Score:
        answer = worker.ask(prompt, response, self._limits.seconds)
        if answer is None:
            how = worker.end()
            return RewardError(
                f"the reward {self.name}, on prompt {prompt.prompt_id} (task {prompt.task!r}: {prompt.text!r}) and "
                f"response {response!r}, {self._why(how)}. What it printed is in {self._output.file}."
            )
        if "broken" in answer:
            raise RuntimeError(f"the reward {self.name} is broken, in its own process:\n{answer['broken']}")
        return RewardError(str(answer["error"])) if "error" in answer else float(answer["score"])

    def _why(self, code: int | None) -> str:
        if code is None:
            return (
                f"took longer than {self._limits.seconds:g} s, and its process was ended: see --hybrid-reward-timeout"
            )
        if code < 0:
            return f"ended its process by the signal {signal.Signals(-code).name} (SIGKILL: often out of memory)"
        return f"ended its process with exit code {code}"


class _Worker:
    """One process, and the socket to it."""

    def __init__(self, how: Any, output: int) -> None:
        self._socket, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from megatron_hybrid.rewards.worker import main; "
        try:
            # Popen starts a new program at once: safe beside threads and a device, where a fork would copy their locks.
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code}main({theirs.fileno()}, {os.getpid()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # what it starts can be ended with it
            )
        finally:
            theirs.close()  # only the process holds it now, so its death reads as the end
        self.ended = False
        self._send(how)

    def ask(self, prompt: Prompt, response: str, timeout_s: float) -> dict[str, Any] | None:
        """What it says of a response; None where it does not."""
        return self.answer(timeout_s) if self._send((prompt, response)) else None

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The next one; None if there is none in time, or none at all."""
        try:
            if not self._socket.poll(None if math.isinf(timeout_s) else timeout_s):
                return None
            found = json.loads(self._socket.recv_bytes(_LONGEST_ANSWER_BYTES))
        except (EOFError, OSError):
            return None
        assert isinstance(found, dict)
        return found

    def end(self) -> int | None:
        """Ends it, with what it has started; its exit code, negative for a signal, where it had ended by itself."""
        self.ended = True
        by_itself = self._wait(0 if self._holds_socket() else 5)  # which closes a moment before its process ends
        if by_itself is None:
            self._process.send_signal(signal.SIGUSR1)  # it writes where it is, see worker.py
            self._wait(1.0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        return by_itself

    def _wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _holds_socket(self) -> bool:
        try:
            return not self._socket.poll(0)
        except OSError:
            return False

    def _send(self, what: Any) -> bool:
        try:
            self._socket.send(what)
        except OSError:
            return False
        return True


def _end_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.end()
