"""What the model writes is run where it can do no harm: each promise of `sandbox.py` is held against a program that
breaks it. A program that comes to its end without an exception passes, so each says by itself what it could do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards import sandbox
from megatron_hybrid.rewards.build import build_rubric
from megatron_hybrid.rewards.python_tests import PythonTestsReward, extract_code
from megatron_hybrid.rewards.sandbox import Limits, check_sandbox, passes

ROOT = Path(__file__).parents[2]
LIMITS = Limits(seconds=60, memory_gib=1)


def _there_is_one() -> bool:
    try:
        check_sandbox()
    except ConfigError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _there_is_one(), reason="this machine gives nobody the right to make namespaces")


def fails_with(error: str, attempt: str) -> str:
    """A program that passes if and only if `attempt` raises the error."""
    lines = "\n".join(f"    {line}" for line in attempt.splitlines())
    return f"try:\n{lines}\nexcept {error}:\n    pass\nelse:\n    raise SystemExit('it could')"


def test_code_that_passes_its_tests_passes_and_other_code_does_not():
    program = "def double(n):\n    return 2 * n"
    assert passes(program, ["assert double(2) == 4", "assert double('a') == 'aa'"], LIMITS)
    assert not passes(program, ["assert double(2) == 4", "assert double(2) == 5"], LIMITS)


@pytest.mark.parametrize(
    "program",
    [
        "def f(:",
        "x = 1\0",
        "'\ud800'",
        "raise KeyboardInterrupt",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "(" * 100_000,
        "import os\nfor number in range(3, 64):\n    try: os.write(number, b'x' * 1000)\n    except OSError: pass",
        "import os\nfor number in range(64):\n    try: os.close(number)\n    except OSError: pass",
        "import atexit, os; atexit.register(os._exit, 0); raise ValueError",
    ],
)
def test_a_program_that_ends_by_other_means_than_its_tests_has_not_passed(program):
    assert not passes(program, ["assert False"], Limits(5, 0.25))


@pytest.mark.parametrize("address", ["('127.0.0.1', {port})", "('192.0.2.1', 80)", "('localhost', {port})"])
def test_there_is_no_network(address):
    import socket

    attempt = f"import socket; socket.create_connection({address}, timeout=1)"
    with socket.create_server(("127.0.0.1", 0)) as server:  # somebody listens, outside
        attempt = attempt.format(port=server.getsockname()[1])
        assert passes(fails_with("OSError", attempt), [], LIMITS)


def test_the_machine_has_no_other_device_there_than_an_idle_loopback():
    assert passes("import socket", ["assert [name for _, name in socket.if_nameindex()][:1] == ['lo']"], LIMITS)
    assert passes("import os", ["assert not os.path.exists('/sys') and not os.path.exists('/proc')"], LIMITS)


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HYBRID_SERVER_API_KEY", "secret")
    # Python itself sets LC_CTYPE where there is no locale.
    assert passes("import os", ["assert set(os.environ) <= {'LC_CTYPE'}, os.environ"], LIMITS)


@pytest.mark.parametrize("path", [str(ROOT / "README.md"), "/etc/passwd", "/var", "/proc/1/environ"])
def test_files_of_the_machine_are_not_there_to_read(path):
    assert passes(fails_with("FileNotFoundError", f"import os; os.stat({path!r})"), [], LIMITS)


@pytest.mark.parametrize("folder", ["", "/usr", "/usr/lib", "/dev", sys.base_prefix])
def test_nothing_can_be_written_outside_of_its_own_folder(folder):
    path = f"{folder}/written_by_the_model"
    assert passes(fails_with("OSError", f"open({path!r}, 'w')"), [], LIMITS)
    assert not Path(path).exists()


def test_what_it_writes_into_its_folder_is_bounded_and_gone():
    assert passes("open('a', 'w').write('x')", ["assert open('/tmp/a').read() == 'x'"], LIMITS)
    assert not Path("/tmp/a").exists()
    assert passes("import os", ["assert os.listdir('/tmp') == []"], LIMITS), "nothing is left of the one before"
    assert passes(fails_with("OSError", "open('a', 'wb').write(bytes(17 << 20))"), [], LIMITS), "a file"
    many = "for name in 'abcdef':\n    open(name, 'wb').write(bytes(15 << 20))"
    assert passes(fails_with("OSError", many), [], LIMITS), "all files"


def test_it_is_nobody_and_can_become_nobody_else():
    assert passes("import os", ["assert os.getuid() != 0 and os.getpid() == 1"], LIMITS)
    for attempt in ("os.setuid(0)", "os.chroot('.')", "os.unshare(os.CLONE_NEWNS)", "os.kill(2, 0)"):
        assert passes(fails_with("OSError", f"import os; {attempt}"), [], LIMITS), attempt


def test_memory_is_limited():
    assert passes(fails_with("MemoryError", "bytearray(2 << 30)"), [], LIMITS)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "import os, time\nos.fork()\nos.setsid() if os.getpid() != 1 else None\ntime.sleep(600)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\ntime.sleep(600)",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(600)",
    ],
    ids=["loop", "sleep", "forked", "thread", "deaf"],
)
def test_what_never_ends_is_ended_with_all_that_it_started(program):
    marker = f"x{os.getpid()}y{time.monotonic_ns()}"
    assert not passes(f"{marker} = 1\n{program}", [], Limits(1, 1))
    assert _sandboxes() == []


def test_a_fork_bomb_ends_where_it_began():
    bomb = "import os\nmade = 0\nwhile True:\n    try:\n        os.fork(); made += 1\n    except OSError: pass"
    assert not passes(bomb, [], Limits(1, 1))
    assert _sandboxes() == []
    counted = (
        "import os, time\nmade = 0\ntry:\n    while made < 1000:\n        if os.fork() == 0: time.sleep(60)\n"
        "        made += 1\nexcept BlockingIOError: pass"
    )
    assert passes(counted, ["assert 0 < made < 32, made"], LIMITS)
    assert _sandboxes() == []


def test_a_million_lines_go_nowhere(capfd):
    assert passes("for line in range(10**6): print(line)", [], LIMITS)
    assert capfd.readouterr() == ("", "")


def test_a_process_that_scores_can_run_it_too(tmp_path):
    """Its own limit of memory is below what a sandbox would ask for."""
    online = OnlineConfig(
        reward="python_tests",
        allow_code_execution=True,
        reward_workers=1,
        reward_memory=2.0,
        run_dir=str(tmp_path),
    )
    from tests.rewards.test_rubric import rollouts

    batch = rollouts(["```python\nx = 1\n```", "```\nx = 2\n```", "no code"])
    for prompt in batch.prompts:
        prompt.entry["record"] = {"tests": "assert x == 1"}
    assert build_rubric(online).score(batch).rewards.tolist() == [1, 0, 0]


@pytest.mark.parametrize("record", [{}, {"tests": None}, {"tests": []}, {"tests": [1]}, {"tests": {"a": 1}}])
def test_a_record_without_tests_is_a_mistake_in_the_data(record):
    with pytest.raises(DataError, match="has the tests .*expected Python text"):
        PythonTestsReward(LIMITS).score(Prompt(3, (1,), "?", "code", None, {"record": record}), "x = 1")


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("first\n```python\na = 1\n```\nbetter:\n```py\na = 2\n```\n", "a = 2\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```python\na = 1\n```\nrun it:\n```bash\npython a.py\n```", "a = 1\n"),
        ("<answer>a = 1</answer>", "a = 1"),
        ("a = 1", "a = 1"),
        ("```python\nnever closed", "```python\nnever closed"),
        ("```" * 50_000, "" + "```" * 50_000),
    ],
)
def test_the_last_block_of_python_is_what_is_run(response, code):
    assert extract_code(response) == code or set(response) == {"`"}


def test_it_is_off_unless_allowed():
    with pytest.raises(ConfigError, match="allow_code_execution is False.*has to be allowed"):
        OnlineConfig(reward="0.5*python_tests,1*exact_match")
    with pytest.raises(ConfigError, match="allow_code_execution is True, and reward 'by_source'"):
        OnlineConfig(allow_code_execution=True)


def test_without_a_sandbox_nothing_is_run(tmp_path):
    """Who may make no namespaces is told what is missing, before the run starts."""
    proof = tmp_path / "proof"
    check_sandbox.cache_clear()
    refused = mock.patch.object(sandbox, "_CHILD", _without_the_right(tmp_path))
    try:
        with refused, pytest.raises(ConfigError, match="without protection: .*PermissionError.*user namespaces"):
            build_rubric(OnlineConfig(reward="python_tests", allow_code_execution=True))
        with refused, pytest.raises(Exception, match="there is no sandbox for a response's code"):
            passes(f"open({str(proof)!r}, 'w')", [], LIMITS)
    finally:
        check_sandbox.cache_clear()
    assert not proof.exists()


ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user; all other tests are an ordinary one's")


@ONLY_ROOT
def test_an_ordinary_user_is_kept_from_the_same_things(tmp_path):
    """By a user namespace, in which he has the rights that root has outside."""
    kept = (
        "import os; from tests.rewards import test_sandbox as t; assert os.getuid() == 65534; "
        "[t.test_there_is_no_network(f'({host!r}, {{port}})') for host in ('127.0.0.1', '192.0.2.1')]; "
        "t.test_the_machine_has_no_other_device_there_than_an_idle_loopback(); "
        "[t.test_files_of_the_machine_are_not_there_to_read(path) for path in ('/etc/passwd', '/var')]; "
        "[t.test_nothing_can_be_written_outside_of_its_own_folder(folder) for folder in ('', '/usr', '/dev')]; "
        "t.test_what_it_writes_into_its_folder_is_bounded_and_gone(); "
        "t.test_it_is_nobody_and_can_become_nobody_else(); "
        "t.test_memory_is_limited(); "
        "t.test_what_never_ends_is_ended_with_all_that_it_started('while True: pass'); "
        "t.test_a_fork_bomb_ends_where_it_began(); "
        "assert t.passes('import os', ['assert set(os.environ) <= {\"LC_CTYPE\"}'], t.LIMITS); print('all kept')"
    )
    done = as_nobody([sys.executable, "-c", kept], tmp_path)
    assert done.stdout == "all kept\n", done.stderr


@ONLY_ROOT
def test_an_ordinary_user_without_namespaces_is_refused_before_anything_runs(tmp_path):
    """The kernel gives nobody a user namespace who lives behind a chroot."""
    asks = (
        "from megatron_hybrid.online_config import OnlineConfig; from megatron_hybrid.rewards import build; "
        "build.build_rubric(OnlineConfig(reward='python_tests', allow_code_execution=True))"
    )
    done = as_nobody([sys.executable, "-c", asks], tmp_path, jailed=True)
    *_, said = done.stderr.splitlines()
    assert "ConfigError: the reward python_tests would run what the model writes without protection" in said
    assert "PermissionError: [Errno 1] Operation not permitted" in said and "user namespaces (sysctl" in said


def as_nobody(command: list[str], folder: Path, *, jailed: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs it as a user who may read Python, the environment and this checkout, wherever they lie; root alone can.

    jailed  behind a chroot
    """
    script = ["set -e"]
    behind = {}
    for number, path in enumerate([Path(sys.base_prefix), Path(sys.prefix).resolve(), ROOT]):
        gates = [parent for parent in reversed(path.parents) if not parent.stat().st_mode & 1]
        if gates:  # such as /root
            behind[folder / str(number)] = gates[0], path
    script += [f"mkdir {held}; mount --bind {path} {held}" for held, (_, path) in behind.items()]
    script += [f"mount -t tmpfs -o mode=755 none {gate}" for gate in {gate for gate, _ in behind.values()}]
    script += [f"mkdir -p {path}; mount --bind {held} {path}" for held, (_, path) in behind.items()]
    if jailed:
        script += [f"mkdir {folder}/jail; mount --rbind / {folder}/jail; cd {ROOT}"]
        script += [f'exec chroot --userspec=65534:65534 --groups= {folder}/jail sh -c \'cd {ROOT}; "$@"\' sh "$@"']
    else:
        script += [f'cd {ROOT}; exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"']
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join(script), "sh", *command],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_python_may_lie_below_the_folder_that_programs_write_to(tmp_path):
    """A scratch disk is often where environments are made."""
    prefix = tmp_path / "python"
    prefix.mkdir()
    (prefix / "here").touch()
    (tmp_path / "root").mkdir()
    looks = (
        "import os, sys; from megatron_hybrid.rewards import sandbox_child as child; root, prefix = sys.argv[1:]; "
        "child._unshare(os.geteuid() == 0); child._mount_root(root, prefix); print(os.listdir(root + prefix))"
    )
    command = [sys.executable, "-c", looks, str(tmp_path / "root"), str(prefix)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['here']\n", done.stderr


def _without_the_right(folder: Path) -> Path:
    """The sandbox's own file, whose kernel refuses namespaces: as a container without CAP_SYS_ADMIN does."""
    file = folder / "child.py"
    refusal = "import os\ndef refuse(flags): raise PermissionError(1, 'not permitted')\nos.unshare = refuse\n"
    file.write_text(refusal + Path(sandbox.__file__).with_name("sandbox_child.py").read_text())
    return file


def _sandboxes() -> list[str]:
    """Command lines of programs that still run, of any sandbox, ten seconds later at most."""
    for _ in range(1000):
        found = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
        alive = [line for line in found.splitlines() if "job = json.loads" in line and " Z" not in line]
        if not alive:
            return []
        time.sleep(0.01)
    return alive
