"""A Slurm cluster of two nodes on this machine: Debian's own daemons, everything they write in one folder.

    with cluster(folder) as slurm:
        slurm.run("sbatch", ...)          # any of Slurm's commands, spoken to this cluster

munged, slurmctld and one slurmd per node run in the foreground as children of this process, on ports of their own, and
are ended by their ids. No systemd, cgroups, accounting or database. Root only: slurmd starts jobs for users.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.runtime.spawn import free_port
from tests.launch.launched import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("node0", "node1")
CPUS = 8
"""Of each node, on paper."""

CONFIG = """
ClusterName=two_nodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that was requeued may start again after cred_expire seconds; 2 minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str | None:
    """What keeps a cluster from running here after trying to install it; None: nothing."""
    if os.geteuid() != 0:
        return "slurmd starts jobs for users and has to be root"
    if not _missing():
        return None
    if shutil.which("apt-get") is None:
        return f"{_missing()} not found, and no apt-get to install them"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-q", *command], env=quiet, capture_output=True, text=True)
        if done.returncode != 0:
            return f"{_missing()} not found, and apt-get {command[0]} failed: {done.stderr[-300:]}"
    return f"apt-get installed {PACKAGES}, but {_missing()} not found" if _missing() else None


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where daemons are, which not every root has on its path


@dataclass(frozen=True)
class Cluster:
    """A running one."""

    folder: Path

    def run(self, *command: str, **more: str) -> str:
        """What a command prints; `more` are environment variables, which jobs inherit."""
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=self.environment(**more), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def environment(self, **more: str) -> dict[str, str]:
        return environment(SLURM_CONF=f"{self.folder}/slurm.conf", PATH=_path(), **more)

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The last words of every daemon."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts it and waits until both nodes are idle; ends its daemons on exit, jobs that still run first."""
    ours = Cluster(folder)
    _configure(folder)
    key, munge = folder / "munge.key", folder / "munge"
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--pid-file={munge}.pid", f"--seed-file={munge}.seed", f"--log-file={munge}.log"]
    daemons: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, daemons)

        def start(name: str, command: list[str]) -> None:
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            daemons.append(subprocess.Popen(command, env=ours.environment(), stdout=log, stderr=log))

        start("munged", munged)
        _until("munged listens", lambda: (folder / "munge.socket").exists(), ours)
        start("slurmctld", ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"])
        for node in NODES:
            start(node, ["slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf"])
        _until("both nodes are idle", lambda: ours.run("sinfo", "-h", "-o", "%T %D").split()[:2] == ["idle", "2"], ours)
        try:
            yield ours
        finally:
            with contextlib.suppress(AssertionError):
                ours.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root")
                ours.run("scancel", "--user=root")
                _until("no job runs", lambda: ours.run("squeue", "-h") == "", ours)


def _configure(folder: Path) -> None:
    for name in ("controller", *NODES):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged distrusts a socket in a folder that others cannot enter
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CPUS} State=UNKNOWN"
        for node in NODES
    )
    config = CONFIG.format(folder=folder, host=host, controller_port=free_port(), nodes=nodes)
    (folder / "slurm.conf").write_text(config)


def _until(what: str, happened: Callable[[], bool], ours: Cluster) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):  # a daemon that does not listen yet
            if happened():
                return
        assert time.monotonic() < deadline, f"{what}: not within a minute\n{ours.logs()}"
        time.sleep(0.2)


def _end(daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
