"""The inside of `sandbox.py`: makes the namespaces, goes into them, and becomes the interpreter that runs a program.

Run as a file by an isolated interpreter (-I -S), with the settings as JSON in its argument and the job on stdin. Ends
with words on stderr where it could not make everything that `sandbox.py` promises; nothing has been run then.
Standard library only: nothing of this package may be imported.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_FILES_BYTES = 64 << 20
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # on every architecture
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_PROGRAM = """
import json, os, sys
job = json.loads(sys.stdin.buffer.read())
space = {"__name__": "__main__"}
for text in (job["program"], *job["tests"]):
    exec(compile(text, "response", "exec"), space)
os.write(int(sys.argv[1]), job["token"].encode())
os._exit(0)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    _end_with(settings["parent"])
    with open("/proc/self/oom_score_adj", "w") as file:  # the first to go where memory runs out
        file.write("1000")
    # Not root's: processes are counted by user, and root's are not. A number of its own, so that nobody else's count.
    user = 20_000 + os.getpid() % 40_000 if os.geteuid() == 0 else None
    _unshare(user is not None)
    _mount_root(settings["root"], settings["prefix"])
    os.chroot(settings["root"])
    os.chdir("/tmp")
    child = os.fork()  # the first process of the new process namespace: all others end with it
    if child == 0:
        _become_program(settings, user)
    if settings["seconds"] is not None:
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])  # which ends this process, and that the program
    os.waitpid(child, 0)


def _end_with(parent: int) -> None:
    _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("who asked for it has gone")


def _unshare(is_root: bool) -> None:
    flags = os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    if is_root:
        os.unshare(flags)
        return
    uid, gid = os.getuid(), os.getgid()
    os.unshare(flags | os.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount_root(root: str, prefix: str) -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)  # nothing of what follows is seen outside
    _mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")  # first: Python itself may lie below it
    _mount("none", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={_FILES_BYTES},mode=1777")
    for path in (*_SYSTEM, prefix):
        inside = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.exists(inside):
            os.makedirs(inside)
            _bind(path, inside)
            _set_attributes(inside, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
        elif os.path.isfile(path):
            _bind_file(path, inside)
            _set_attributes(inside, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    for path in _DEVICES:
        _bind_file(path, root + path)
    _set_attributes(root, _MOUNT_ATTR_RDONLY, recursive=False)


def _become_program(settings: dict[str, Any], user: int | None) -> None:
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    error = os.dup(2)
    os.set_inheritable(error, False)
    os.dup2(1, 2)
    try:
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        _call(_libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(settings)
        os.execve(settings["python"], [settings["python"], "-I", "-S", "-c", _PROGRAM, str(settings["verdict"])], {})
    except BaseException as reason:
        os.write(error, f"{type(reason).__name__}: {reason}".encode())
    os._exit(1)


def _limit(settings: dict[str, Any]) -> None:
    limits = {"NPROC": 32, "NOFILE": 64, "FSIZE": 16 << 20, "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0}
    if settings["memory_bytes"] is not None:
        limits["AS"] = settings["memory_bytes"]
    if settings["seconds"] is not None:
        limits["CPU"] = int(settings["seconds"]) + 1
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        _, most = resource.getrlimit(which)
        lower = value if most == resource.RLIM_INFINITY else min(value, most)  # a limit of the run's own stays
        resource.setrlimit(which, (lower, lower))


def _bind_file(path: str, inside: str) -> None:
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    with open(inside, "w"):
        pass
    _bind(path, inside)


def _bind(path: str, inside: str) -> None:
    _mount(path, inside, None, _MS_BIND | _MS_REC)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call(_libc.mount, *texts[:3], ctypes.c_ulong(flags), texts[3])


def _set_attributes(path: str, attributes: int, recursive: bool = True) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    number, size = ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_size_t(ctypes.sizeof(wanted))
    _call(_libc.syscall, number, _AT_FDCWD, path.encode(), ctypes.c_uint(flags), wanted, size)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}{arguments[:3]}: {os.strerror(code)}")


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except OSError as reason:
        sys.exit(f"{type(reason).__name__}: {reason}")
