"""Programs that a model wrote, run by bubblewrap (`bwrap`) where they can do no harm.

A program has no network, sees no processes but its own, and of the files only Python's and the
system's libraries, read-only, and a small folder in memory. Its time, memory, files and processes
are limited. Nothing of it is left when the call returns.

A program passes if it comes to its last line. A random token says so, which is written after that
line: leaving early with status 0 does not pass. The token is no secret from a program that searches
its own interpreter; such a program could as well replace `==`.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

INSIDE = Path(__file__).with_name("sandboxed.py")
ENVIRONMENT = {"HOME": "/tmp", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT |= {"PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"}
LIB = ("lib", "lib32", "lib64")
SYSTEM = (*(f"{top}/{lib}" for top in ("", "/usr", "/usr/local") for lib in LIB),)
SYSTEM += ("/etc/alternatives", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# What no namespace and no limit holds: memory that belongs to no process, the keys of the session
# that started us, and io_uring, which opens sockets unseen.
REFUSED = ("memfd_create", "shmget", "msgget", "add_key", "request_key", "keyctl", "io_uring_setup")
NOBODY, DISK = "65534", 64 << 20
BUBBLEWRAP = (
    *("bwrap", "--die-with-parent", "--new-session", "--unshare-all", "--unshare-user"),
    *("--disable-userns", "--uid", NOBODY, "--gid", NOBODY, "--proc", "/proc"),
    *("--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp", "--seccomp"),
)
PATIENCE = 30  # seconds that a loaded machine may take to start a program
SMALLEST_MEMORY = 64  # MiB; the interpreter itself takes about half
INSTALL = "run apt-get install bubblewrap libseccomp2, or their like; bubblewrap 0.8 or newer"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`reason`: "passed", "failed: <exception>", "timed out", "out of memory" or "killed by …"."""

    passed: bool
    reason: str


def run_program(source: str, *, seconds: float = 10.0, memory_mib: int = 1024) -> Outcome:
    """Run Python source; what it does stays in the sandbox. May be called from several threads.

    seconds: by the clock, for the program and all processes that it starts.
    memory_mib: address space of one process, and memory of all together.

    Raises OSError with one sentence where this machine cannot sandbox: nothing was run then.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds must be a positive number, got {seconds}.")
    if memory_mib < SMALLEST_MEMORY:
        raise ValueError(f"memory_mib must be at least {SMALLEST_MEMORY}, got {memory_mib}.")
    if shutil.which("bwrap") is None:
        raise OSError(f"Programs are sandboxed by bubblewrap, which is not installed; {INSTALL}.")
    token, memory = secrets.token_hex(), memory_mib << 20
    task = {"source": source, "token": token, "seconds": math.ceil(seconds), "memory": memory}
    with tempfile.TemporaryFile() as calls, tempfile.TemporaryDirectory(dir="/tmp") as stage:
        _refuse(calls)
        with subprocess.Popen(
            _command(calls.fileno(), stage),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | {"PATH": os.environ["PATH"]},
            pass_fds=[calls.fileno()],
            start_new_session=True,  # away from the terminal, its input and its signals
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(json.dumps(task).encode())
                ended = _watch(child, child.stdout.fileno(), seconds, memory)
            finally:
                if not any(_each(child, _kill)):
                    child.kill()
                child.wait()  # until all of the namespace is gone
            # What a pipe holds, and no more: whoever writes on and on, waits.
            said, *written = os.read(child.stdout.fileno(), 1 << 16).split(token.encode())
    if not written:
        why = " ".join(said.decode(errors="replace").split()) or ended
        raise OSError(f"Programs cannot be sandboxed on this machine ({why}); {INSTALL}.")
    if ended is None:
        ended = written[1].split(b"\n")[0].decode() if written[1:] else _by(child.returncode)
    return Outcome(ended == "passed", ended)


def refusal() -> str | None:
    """Why this machine cannot sandbox, in one sentence; None if it can: a program was run."""
    try:
        outcome = run_program("import math, random, re")
    except OSError as error:
        return str(error)
    return None if outcome.passed else f"A first sandboxed program did not pass: {outcome.reason}."


def _command(calls: int, stage: str) -> list[str]:
    """The command that starts `sandboxed.py`.

    calls: a file that says which calls to refuse; stage: an empty folder.
    """
    python = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, sys.prefix) for lib in LIB]
    shown = (*SYSTEM, *python, sys.executable, f"{sys.prefix}/pyvenv.cfg")
    visible = {path: os.path.realpath(path) for path in shown if os.path.exists(path)}
    visible["/sandboxed.py"] = str(INSIDE)
    before: list[str] = []
    if os.geteuid() == 0:
        # Limits on processes spare root, so root becomes nobody. Its own folders may stop nobody on
        # the way to Python; on a stage of this process alone, they do not.
        lines = ["mount -t tmpfs -o mode=755 stage $0"]
        for number, (path, source) in enumerate(visible.items()):
            visible[path] = place = f"{stage}/{number}"
            lines.append(f"{'mkdir' if os.path.isdir(source) else 'touch'} {place}")
            lines.append(f"mount --bind {shlex.quote(source)} {place}")
        script = "\n".join((*lines, 'exec "$@"'))
        before = ["unshare", "--mount", "sh", "-ec", script, stage, "setpriv", "--clear-groups"]
        before += [f"--reuid={NOBODY}", f"--regid={NOBODY}"]
    binds = [part for path, source in visible.items() for part in ("--ro-bind", source, path)]
    binds += [part for device in DEVICES for part in ("--dev-bind", device, device)]
    started = ["--remount-ro", "/", sys.executable, "/sandboxed.py"]
    return [*before, *BUBBLEWRAP, str(calls), *binds, *started]


def _refuse(file: Any) -> None:
    """Write a filter in which `REFUSED` fail, and all sockets but those of Unix."""
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError) as error:
        raise OSError(f"Programs are sandboxed by libseccomp, but {error}; {INSTALL}.") from error
    calls: Any = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in REFUSED:
        calls.add_rule(seccomp.ERRNO(errno.EPERM), name)
    not_unix = seccomp.Arg(0, seccomp.NE, socket.AF_UNIX)  # vsock leaves a network namespace
    calls.add_rule(seccomp.ERRNO(errno.EPERM), "socket", not_unix)
    calls.export_bpf(file)
    file.seek(0)


def _watch(child: subprocess.Popen[bytes], report: int, seconds: float, memory: int) -> str | None:
    """The reason to end the program; None where it ended by itself."""
    started, start = False, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.02)
            return None
        if not started and select.select([report], [], [], 0)[0]:
            started, start = True, time.monotonic()
        if time.monotonic() - start > (seconds if started else PATIENCE):
            return "timed out"
        if sum(_each(child, lambda process: process.memory_info().rss)) > memory:
            return "out of memory"


def _each(child: subprocess.Popen[bytes], do: Callable[[psutil.Process], Any]) -> list[Any]:
    """What `do` gives for each process below the child; some may end meanwhile."""
    found: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(child.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(do(process))
    return found


def _kill(process: psutil.Process) -> bool:
    """End a process inside; bwrap, outside, stays to see the namespace gone."""
    with contextlib.suppress(FileNotFoundError):
        if os.readlink(f"/proc/{process.pid}/ns/pid") != os.readlink("/proc/self/ns/pid"):
            process.kill()
            return True
    return False


def _by(status: int) -> str:
    """How a program ended that said nothing; bubblewrap adds 128 to a signal."""
    if status == 128 + signal.SIGXCPU:
        return "timed out"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(status - 128).name}"
    return f"failed: left with exit status {status} before its end"
