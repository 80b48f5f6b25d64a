"""A pool of local ranks that run one function after another: `torchrun` for tests, examples and notebooks.

Importing torch and Megatron costs a rank about 8 s of CPU and 0.75 GB, so the ranks are kept alive between jobs:

    with RankPool(2) as pool:
        gradients = pool.run(tensor_parallel_gradient, hidden_size=8)   # one result per rank, in rank order

A job is any function that pickle can name (one at the top level of a module, or of the running script); arguments and
results travel by value. It finds what torchrun would set (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT) and by default a gloo process group. Not here: several machines, GPUs, a second try after a failure.
"""

import atexit
import faulthandler
import gc
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NoReturn

from megatron_hybrid.errors import sendable

_LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 300.0
"""Importing torch takes a rank seconds, but minutes where many ranks share two busy cores and a cold disk."""

_PARENT_CHECK_S = 5.0


class RankPool:
    """`size` local processes, kept alive for many jobs, ended by `close`, by leaving `with`, or with their parent.

    size        ranks
    init        True: a job finds a gloo process group of all ranks. False: it makes its own (as Megatron's
                `initialize_megatron` does). All groups are destroyed after the job: idle ones cost threads that poll
    timeout_s   seconds a job may take; also the timeout of the pool's collectives

    After each job Megatron's global state (parallel state, arguments, micro-batch calculator) is destroyed where a job
    has made it, so the next one finds a fresh Megatron. After a failure the pool is dead: ranks that hang in a
    collective cannot be reused.
    """

    def __init__(self, size: int, *, init: bool = True, timeout_s: float = 300.0) -> None:
        if size < 1:
            raise ValueError(f"a pool needs at least one rank, got size {size}")
        self.size = size
        self.init = init
        self.timeout_s = timeout_s
        spawn = get_context("spawn")  # a fork would copy threads' locks of torch in whatever state they are
        pipes = [spawn.Pipe() for _ in range(size)]
        # A pipe of its own for each rank's stacks: written to one stderr at once they come out interleaved.
        stacks = [spawn.Pipe(duplex=False) for _ in range(size)]
        # Not daemons: Megatron's checkpoint writer starts processes of its own, which daemons may not.
        self._processes = [
            spawn.Process(
                target=_serve,
                args=(theirs, write_stacks, rank, size, init, timeout_s),
                name=f"rank-{rank}-of-{size}",
            )
            for rank, ((_, theirs), (_, write_stacks)) in enumerate(zip(pipes, stacks, strict=True))
        ]
        self._pipes: list[Connection] = [ours for ours, _ in pipes]
        self._stacks: list[Connection] = [ours for ours, _ in stacks]
        self.alive = True
        # Registered after multiprocessing's own hook and so run before it: that one would wait for the ranks for ever.
        atexit.register(self.close)
        try:
            with _environment(OMP_NUM_THREADS="1"):  # read when a rank loads torch: one core each
                for process in self._processes:
                    process.start()
            for _, theirs in pipes + stacks:
                theirs.close()  # only the rank holds its end now, so its death reads as the end of the pipe
            self._collect(f"starting {size} ranks", _START_TIMEOUT_S)
        except BaseException:
            self._end()
            raise

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls `function(*args, **kwargs)` on every rank; returns what each gave, in rank order.

        Raises what the first failing rank raised, with that rank's traceback as a note; TimeoutError after `timeout_s`,
        with the stack of every rank on stderr; RuntimeError where a rank's process has died.
        """
        if not self.alive:
            raise RuntimeError("this pool has ended, by close() or by a job that failed: make a new RankPool.")
        name = getattr(function, "__qualname__", repr(function))
        # sys.path goes along because the function's module must be importable there, and paths may have come since.
        job = pickle.dumps((free_port(), sys.path, pickle.dumps((function, args, kwargs))))
        try:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send_bytes(job)
                except OSError:
                    self._died(name, rank)
            return self._collect(name, self.timeout_s)
        except BaseException:  # a KeyboardInterrupt too: it leaves ranks in the middle of a job
            self._end()
            raise

    def close(self) -> None:
        """Ends the ranks, which are idle between jobs; does nothing the second time."""
        if self.alive:
            for pipe in self._pipes:
                pipe.close()  # a rank reads the end of its pipe and leaves
            for process in self._processes:
                process.join(timeout=10)
            self._end()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _collect(self, name: str, timeout_s: float) -> list[Any]:
        """One answer from every rank, taken as they come, so that the first failure is seen while others still hang."""
        deadline = time.monotonic() + timeout_s
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: list[Any] = [None] * self.size
        while waiting:
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(name, sorted(waiting.values()), timeout_s)
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank] = self._answer(name, rank)
        return results

    def _answer(self, name: str, rank: int) -> Any:
        try:
            result, error = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self._died(name, rank)
        if error is not None:
            # The peers of a rank that died fail with gloo's words about a lost connection: name the cause instead. The
            # wait is for the moment between a dying process closing its sockets and its end.
            sentinels: list[Any] = [process.sentinel for process in self._processes]
            for dead in wait(sentinels, timeout=0.2):
                self._died(name, sentinels.index(dead))
            raise error
        return result

    def _died(self, name: str, rank: int) -> NoReturn:
        self._processes[rank].join(timeout=5)  # the pipe ends a moment before the process does
        raise RuntimeError(
            f"rank {rank} of {self.size} died in or before {name} with exit code {self._processes[rank].exitcode}: a "
            "negative code is a signal (-9: often out of memory). Its last words are on stderr."
        ) from None

    def _give_up(self, name: str, late: list[int], timeout_s: float) -> NoReturn:
        for rank, process in enumerate(self._processes):
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)  # it writes the stack of each of its threads, see _serve
                print(f"rank {rank} of {self.size}:\n{_read_all(self._stacks[rank])}", file=sys.stderr)
        raise TimeoutError(
            f"{name} took longer than {timeout_s:g} s on rank(s) {late} of {self.size}. Where some ranks are done and "
            "others wait, a collective was not called by all of them; the stacks are on stderr."
        )

    def _end(self) -> None:
        self.alive = False
        atexit.unregister(self.close)
        for pipe in self._pipes + self._stacks:
            pipe.close()
        for process in self._processes:
            if process.pid is not None:  # else never started
                with suppress(ProcessLookupError):  # it has ended, or not come to make its group
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on at this moment.

    Systems number outgoing connections from 32768 or higher: a port below can only be taken on purpose in the seconds
    until rank 0 listens on it.
    """
    dice = random.SystemRandom()  # the seeded generator would give the same port to every test run of a machine
    while True:
        port = dice.randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((_LOOPBACK, port))
            return port


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for the processes started inside; put back on exit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read_all(stacks: Connection) -> str:
    """What a rank writes, until it has been silent for a moment."""
    text, patience_s = b"", 5.0  # a busy machine may let it wait for the first line
    while wait([stacks], timeout=patience_s) and (part := os.read(stacks.fileno(), 1 << 16)):
        text, patience_s = text + part, 0.3
    return text.decode(errors="replace")


def _serve(pipe: Connection, stacks: Connection, rank: int, size: int, init: bool, timeout_s: float) -> None:
    """A rank's life: start, then answer jobs with (result, error) until the pipe ends."""
    # A group of its own: what a job has started (Megatron's checkpoint writer keeps a helper) ends with the rank.
    os.setpgid(0, 0)
    faulthandler.register(signal.SIGUSR1, file=stacks.fileno())  # the parent asks for them when a job hangs
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ["MASTER_ADDR"] = _LOOPBACK
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve to an address of its own
    pipe.send_bytes(_outcome(_start))
    while True:
        try:
            port, path, job = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # closed by the parent, or reset where it did not read this rank's last answer
            return
        sys.path.extend(entry for entry in path if entry not in sys.path)
        os.environ["MASTER_PORT"] = str(port)  # a new group's store must not meet the last one's on its port
        answer = _outcome(_do, job, timeout_s if init else None)
        sys.stdout.flush()  # into a pipe or file Python writes it at exit only: a job's words come before its result
        pipe.send_bytes(answer)


def wait_for_the_end_of_the_parent() -> None:
    """Returns once the process that multiprocessing started this one from has ended in any way."""
    parent = parent_process()
    assert parent is not None
    # The sentinel, a pipe, also stays open in processes that the parent has forked: hence the look at who it is.
    while not wait([parent.sentinel], timeout=_PARENT_CHECK_S) and os.getppid() == parent.pid:
        pass


def _leave_with_parent() -> None:
    """Ends this rank and its helpers with its parent, even in a job that hangs."""
    wait_for_the_end_of_the_parent()
    os.killpg(0, signal.SIGKILL)


def _outcome(function: Callable[..., Any], *args: Any) -> bytes:
    """(result, None) or (None, error) of a call, pickled; the error carries this rank's traceback as a note."""
    try:
        return pickle.dumps((function(*args), None))
    except BaseException as error:  # SystemExit too: a job that calls exit() must not read as a rank that died
        note = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}:\n{traceback.format_exc()}"
        return pickle.dumps((None, sendable(error, note)))


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def _do(job: bytes, group_timeout_s: float | None) -> Any:
    """The job's result; group_timeout_s: of the group that it finds, None: it finds none."""
    import torch.distributed as dist

    function, args, kwargs = pickle.loads(job)
    if group_timeout_s is not None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=group_timeout_s))
    result = function(*args, **kwargs)
    had_megatron = _forget_megatron()
    if dist.is_initialized():
        dist.destroy_process_group()
    if had_megatron:
        gc.collect()  # its groups lie in cycles with its models, and each has a thread that polls until it is freed
    return result


def _forget_megatron() -> bool:
    """Destroys Megatron's global state where a job has loaded it, and says whether it had groups; imports nothing."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None:
        return False
    had_groups = bool(parallel_state.model_parallel_is_initialized())
    # Megatron caches the angles of a model's last 32 lengths by the module itself, and so keeps modules' groups alive.
    if rotary := sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding"):
        rotary.RotaryEmbedding.forward.cache_clear()
    if training := sys.modules.get("megatron.training.training"):
        training.destroy_global_state()
    else:
        parallel_state.destroy_model_parallel()
    return had_groups
