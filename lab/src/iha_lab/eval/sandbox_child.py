"""The other side of `sandbox`: started as a script, it runs one program in namespaces of its own.

    outer    enters the namespaces, starts init, waits
    init     process 1 of the new process namespace: builds the root folder, watches, reports
    worker   gives up every right and runs the program

When init ends, for whatever reason, the kernel ends all processes of its namespace. Signals from
inside cannot reach it, nor can a debugger, since it holds capabilities and the worker has none.

A task comes as JSON on standard input, {"source", "seconds", "memory", "visible"}; the report
leaves as JSON on standard output, {"ended": reason} or {"refused": what the machine said}.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

PROCESSES, FILES = 32, 64
MIB = 1 << 20
DISK, LARGEST_FILE = 64 * MIB, 16 * MIB
NOBODY = 65534
LONGEST_REASON = 500
REFUSED = "refused: "

# From Linux's headers.
NEW_NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE, ATTR_READ_ONLY, ATTR_NOSUID = 442, 0x8000, 1, 2
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, SECCOMP_FILTER, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 2, 38
CAPABILITY_VERSION = 0x20080522

# Calls that reach what no namespace and no limit holds: memory that belongs to no process (memfds,
# System V), the keys of the session that started us, and io_uring, which opens sockets unseen.
# machine: (its number in seccomp, `socket`, the calls to refuse)
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 41, (29, 68, 248, 249, 250, 319, 425, 447)),
    "aarch64": (0xC00000B7, 198, (194, 186, 217, 218, 219, 279, 425, 447)),
}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces() -> None:
    """Nobody inside is the user outside, or for root, whom some limits spare, nobody outside.

    Who enters a user namespace can map no ids into it but its own, so a helper stays behind.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        os.setgroups([])
    entered, enter = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(enter)
            if os.read(entered, 1):
                map_ids(Path("/proc", str(os.getppid())), uid, gid)
                os._exit(0)
        finally:
            os._exit(1)
    call("unshare", sum(NEW_NAMESPACES.values()))
    os.write(enter, b".")
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError("user ids cannot be mapped")
    os.close(enter)
    os.close(entered)


def map_ids(process: Path, uid: int, gid: int) -> None:
    (process / "setgroups").write_text("deny")
    for file, outside in (("uid_map", uid), ("gid_map", gid)):
        both = f"0 {outside} 1\n{NOBODY} {NOBODY} 1"
        try:
            (process / file).write_text(both if uid == 0 else f"{NOBODY} {outside} 1")
        except PermissionError:  # root of a container that has no other ids
            (process / file).write_text(f"{NOBODY} {outside} 1")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call("mount", *(text.encode() for text in (source, target, kind)), flags, options.encode())


def build_root(visible: dict[str, str]) -> None:
    """A new root folder in memory: `visible`, read-only, and an empty /tmp. Nothing else."""
    if any(target.startswith("/tmp/") for target in visible):
        raise OSError("Python is in /tmp, which programs have for themselves; install it elsewhere")
    mount("", "/", "", RECURSIVE | PRIVATE)
    mount("root", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/host")
    call("pivot_root", b"/tmp", b"/tmp/host")
    os.chdir("/")
    devices = {f"/dev/{name}": f"/dev/{name}" for name in ("null", "zero", "random", "urandom")}
    for target, source in (visible | devices).items():
        source = f"/host{source}"
        if os.path.isdir(source):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            Path(target).touch()
        mount(source, target, "", BIND | RECURSIVE)
    for folder in ("/proc", "/tmp"):
        os.mkdir(folder)
    mount("proc", "/proc", "proc", NOSUID | NODEV)
    call("umount2", b"/host", DETACH)
    os.rmdir("/host")
    # Whoever makes a user namespace has all capabilities in it, and more of the kernel to attack.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    read_only = struct.pack("QQQQ", ATTR_READ_ONLY | ATTR_NOSUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -1, b"/", AT_RECURSIVE, read_only, ctypes.c_size_t(32))
    options = f"mode=700,size={DISK},nr_inodes=4096,uid={NOBODY},gid={NOBODY}"
    mount("tmp", "/tmp", "tmpfs", NOSUID | NODEV, options)
    os.chdir("/tmp")


def give_up_rights(seconds: float, memory: int) -> None:
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))
    call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    instructions = seccomp_filter(os.uname().machine)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HP", len(instructions) // 8, ctypes.addressof(code))
    call("prctl", SET_SECCOMP, SECCOMP_FILTER, program, 0, 0)


def seccomp_filter(machine: str) -> bytes:
    """`SYSTEM_CALLS` fail, and `socket` for other than Unix: vsock leaves a network namespace."""
    if machine not in SYSTEM_CALLS:
        raise OSError(f"system calls of {machine} are not known")
    architecture, socket, refused = SYSTEM_CALLS[machine]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050001, 0x80000000  # fail: EPERM
    number, architecture_of_call, first_argument = 0, 4, 16
    unix, x32 = 1, 0x40000000
    # (operation, instructions to skip if true, if false, operand)
    lines = [
        (load, 0, 0, architecture_of_call),
        (equal, 1, 0, architecture),
        (end, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, x32),
        (end, 0, 0, fail),
    ]
    for call_number in refused:
        lines += [(equal, 0, 1, call_number), (end, 0, 0, fail)]
    lines += [
        (equal, 0, 3, socket),
        (load, 0, 0, first_argument),
        (equal, 1, 0, unix),
        (end, 0, 0, fail),
        (end, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def work(task: dict[str, Any], token: bytes, pipe: int) -> NoReturn:
    """Run the program; the token says that its end was reached, or an exception left it."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    # The program may replace them, and may fork.
    write, leave, process, this_process = os.write, os._exit, os.getpid, os.getpid()
    # Not __main__, as in HumanEval's own check: what an answer shows off at its end does not run.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = ["program.py"]
    try:
        exec(compile(task["source"], "program.py", "exec", dont_inherit=True), module.__dict__)
        reason = "passed"
    except MemoryError:
        reason = "out of memory"
    except BaseException as error:
        reason = "failed: " + " ".join(traceback.format_exception_only(error)[-1].split())
    if process() == this_process:
        write(pipe, token + reason[:LONGEST_REASON].encode(errors="replace"))
    leave(0)


def watch(worker: int, seconds: float, memory: int) -> int | str:
    """The worker's wait status, or the reason to end it. Buries orphans, as process 1 has to."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        signal.sigtimedwait({signal.SIGCHLD}, 0.02)
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                return ended[1]
        if resident() > memory:
            return "out of memory"
    return "timed out"


def resident() -> int:
    """Bytes in memory of all processes but this one; RLIMIT_AS counts each by itself."""
    pages = 0
    for process in os.listdir("/proc"):
        if process.isdecimal() and process != "1":
            try:
                pages += int(Path("/proc", process, "statm").read_text().split()[1])
            except OSError:  # it ended meanwhile
                continue
    return pages * resource.getpagesize()


def supervise(task: dict[str, Any]) -> str:
    """Init: the reason why the program ended."""
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    build_root(task["visible"])
    token = os.urandom(16)
    read, write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    worker = os.fork()
    if worker == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            os.close(read)
            try:
                give_up_rights(task["seconds"], task["memory"])
            except OSError as error:
                os.write(write, token + f"{REFUSED}{error}".encode())
                os._exit(1)
            work(task, token, write)
        finally:
            os._exit(1)
    call("prctl", SET_DUMPABLE, 0, 0, 0, 0)
    end = watch(worker, task["seconds"], task["memory"])
    if isinstance(end, str):
        return end
    os.set_blocking(read, False)
    try:
        written = os.read(read, 1 << 16)
    except BlockingIOError:  # nothing, and the program's children hold the other end
        written = b""
    return verdict(os.waitstatus_to_exitcode(end), written, token)


def verdict(code: int, written: bytes, token: bytes) -> str:
    if written.startswith(token):
        reason = written.removeprefix(token).decode(errors="replace")
        if reason.startswith(REFUSED):
            raise OSError(reason.removeprefix(REFUSED))
        return reason
    if code == -signal.SIGXCPU:
        return "timed out"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"failed: left with exit status {code} before its end"


def report(**message: str) -> None:
    os.write(1, json.dumps(message).encode())


def main() -> None:
    task = json.load(sys.stdin)
    try:
        # Where memory ends all the same, the kernel takes these processes first.
        Path("/proc/self/oom_score_adj").write_text("1000")
        enter_namespaces()
    except OSError as error:
        return report(refused=str(error))
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    init = os.fork()
    if init:
        # Not to die of it: only who waits for init knows that the whole namespace is gone.
        signal.signal(signal.SIGTERM, lambda *_: os.kill(init, signal.SIGKILL))
        os.waitpid(init, 0)
        return None
    try:
        report(ended=supervise(task))
    except OSError as error:
        report(refused=str(error))
    return None


if __name__ == "__main__":
    main()
