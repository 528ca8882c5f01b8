"""Programs that try to do harm. Where it harms only the test, they first do it outside."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from iha_lab.eval import sandbox
from iha_lab.eval.sandbox import Outcome, refusal, run_program

REFUSAL = refusal()
sandboxed = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


def run(source: str, seconds: float = 60, memory_mib: int = 1024) -> Outcome:
    return run_program(textwrap.dedent(source), seconds=seconds, memory_mib=memory_mib)


def does_it_outside(source: str) -> bool:
    """The control: whether the same program comes to its end without a sandbox."""
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def alive(name: str) -> list[int]:
    """Processes of this machine that call themselves so."""
    found: list[int] = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().strip() == name:
                found.append(int(comm.parent.name))
    return found


@pytest.fixture
def name() -> str:
    return f"iha{secrets.token_hex(5)}"


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that only the sandbox closes: root's programs become nobody, whom others are."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def calls_itself(name: str) -> str:
    return f"import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'{name}')\n"


@sandboxed
def test_a_program_that_comes_to_its_end_passes() -> None:
    assert run("import math, re\nassert math.gcd(12, 18) == 6") == Outcome(True, "passed")


@sandboxed
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'what\\nnow'", "failed: AssertionError: what now"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("def f(:", "failed: SyntaxError: invalid syntax"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("x: undefined = 1", "failed: NameError: name 'undefined' is not defined"),
        ("raise ValueError('x' * 10**6)", f"failed: ValueError: {'x' * (500 - 20)}"),
    ],
)
def test_reasons(source: str, reason: str) -> None:
    assert run(source) == Outcome(False, reason)


@sandboxed
def test_what_an_answer_shows_off_does_not_run() -> None:
    assert run("if __name__ == '__main__': 1 / 0").passed


@sandboxed
@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "exit()",
        "import os; os._exit(0)",
        "import os, sys; os._exit = os.write = lambda *a: None; sys.exit(0)",
        "import builtins; builtins.exec = lambda *a: None; raise SystemExit",
        "import os, signal; signal.signal(14, lambda *a: os._exit(0)); signal.setitimer(0, .1)\n"
        "while True: pass",
        # Whatever is open, with what an insider would write there.
        "import os\n"
        "for fd in range(64):\n"
        "    try: os.write(fd, b'passed')\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        # Or erases what the sandbox wrote.
        "import os\n"
        "for fd in range(64):\n"
        "    try: os.lseek(fd, 0, 0), os.ftruncate(fd, 0)\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        # A child comes to the end, the program itself does not.
        "import os\nif os.fork():\n    os.wait()\n    os._exit(0)\nglobals()['answer'] = 42",
    ],
)
def test_leaving_before_the_tests_does_not_pass(source: str) -> None:
    outcome = run(source + "\nassert globals().get('answer') == 42")
    assert not outcome.passed
    assert outcome.reason.startswith("failed: ")


@sandboxed
@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\n"
        "while True:\n"
        "    try:\n"
        "        while True: pass\n"
        "    except BaseException: pass",
        "import threading; t = threading.Thread(target=lambda: [0 for _ in iter(int, 1)])\n"
        "t.start(); t.join()",
        "import os; os.kill(os.getpid(), 19)",  # SIGSTOP
    ],
)
def test_an_endless_program_is_ended(source: str) -> None:
    start = time.monotonic()
    assert run(source, seconds=0.5) == Outcome(False, "timed out")
    assert time.monotonic() - start < 0.5 + sandbox.PATIENCE


@sandboxed
def test_a_fork_bomb_meets_a_limit_and_leaves_nothing(name: str) -> None:
    counted = """
        import os, signal
        born = 1
        try:
            while born < 500:
                if os.fork() == 0:
                    signal.pause()
                born += 1
        except BlockingIOError:
            raise ValueError(born)
    """
    outcome = run(calls_itself(name) + textwrap.dedent(counted))
    assert outcome.reason in {f"failed: ValueError: {n}" for n in range(16, 33)}
    bomb = """
        while True:
            try: os.fork()
            except OSError: pass
    """
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, calls_itself(name) + textwrap.dedent(bomb), seconds=1)
        most = 0
        while not running.done():
            most = max(most, len(alive(name)))
            time.sleep(0.02)
    assert running.result() == Outcome(False, "timed out")
    assert 1 < most <= 32
    assert alive(name) == []


@sandboxed
@pytest.mark.parametrize(
    "source",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append('x' * 10**6)",
        # Each process keeps within the limit, all together do not.
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0: break\n"
        "x = bytearray(b'x') * (100 << 20)\n"
        "time.sleep(60)",
    ],
)
def test_a_memory_hog_is_ended(source: str) -> None:
    assert run(source, memory_mib=192) == Outcome(False, "out of memory")


@sandboxed
def test_address_space_is_limited_before_it_is_touched() -> None:
    outcome = run("import mmap; mmap.mmap(-1, 1 << 30)", memory_mib=192)
    assert outcome.reason == "failed: OSError: [Errno 12] Cannot allocate memory"


@sandboxed
def test_memory_that_belongs_to_no_process_is_refused() -> None:
    memfd = "import os; os.memfd_create('x')"
    system_v = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.shmget(0, 1 << 20, 0o1600) >= 0, ctypes.get_errno()
    """
    assert does_it_outside(memfd)
    assert run(memfd).reason == "failed: PermissionError: [Errno 1] Operation not permitted"
    assert run(system_v).reason == "failed: AssertionError: 1"


@sandboxed
def test_big_files_and_many_files_are_refused() -> None:
    one = "open('x', 'wb').write(bytes(17 << 20))"
    many = "for i in range(9): open(str(i), 'wb').write(bytes(15 << 20))"
    assert run("open('x', 'wb').write(bytes(15 << 20))").passed
    assert run(one).reason == "failed: OSError: [Errno 27] File too large"
    assert run(many).reason.startswith("failed: OSError: [Errno 28] No space left on device")


READS = """
    import glob, os
    secret = {secret!r}
    ways = ["", "/host", "/tmp/host", "/proc/self/root", "/proc/self/cwd/../../../.."]
    ways += glob.glob("/proc/[0-9]*/root") + glob.glob("/proc/[0-9]*/cwd")
    found = []
    for way in ways:
        try: found.append(open(way + secret).read())
        except OSError: pass
    assert found
"""


@sandboxed
def test_files_cannot_be_read(public: Path) -> None:
    file = public / "secret"
    file.write_text(secrets.token_hex())
    file.chmod(0o666)
    source = READS.format(secret=str(file))
    assert does_it_outside(source)
    assert run(source) == Outcome(False, "failed: AssertionError")


@sandboxed
def test_the_home_folder_and_the_work_are_not_there() -> None:
    """Of both only the way to Python's own libraries, and what says that they are its own."""
    seen = """
        import os
        python, shown = {python!r}, {shown!r}
        for folder in {folders!r}:
            for path, below, files in os.walk(folder):
                if path in python:
                    below.clear()
                else:
                    assert all(path + "/" + file in shown for file in files), path
                    assert any(p.startswith(path + "/") for p in python + shown), path
        for folder in ("/boot", "/opt", "/run", "/sys", "/var", "/usr/bin", "/usr/share/doc"):
            assert not os.path.exists(folder) or any(p.startswith(folder) for p in python), folder
    """
    prefixes = (sys.base_prefix, sys.prefix)
    python = [f"{prefix}/{lib}" for prefix in prefixes for lib in ("lib", "lib64")]
    shown = [sys.executable, f"{sys.prefix}/pyvenv.cfg"]
    folders = [str(Path.home()), str(Path.cwd())]
    source = seen.format(python=python, shown=shown, folders=folders)
    assert run(source) == Outcome(True, "passed")


@sandboxed
def test_the_environment_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = """
        import glob, os
        found = [os.environ["HF_TOKEN"]] if "HF_TOKEN" in os.environ else []
        for file in glob.glob("/proc/[0-9]*/environ") + ["/proc/self/environ"]:
            try: found += [file] if b"HF_TOKEN" in open(file, "rb").read() else []
            except OSError: pass
        assert found
    """
    assert does_it_outside(source)
    assert run(source) == Outcome(False, "failed: AssertionError")


@sandboxed
def test_nothing_outside_can_be_written(public: Path, name: str) -> None:
    places = [
        public,
        Path(f"/host{public}"),
        Path("/dev/shm"),
        Path.cwd(),
        Path.home(),
        Path(os.__file__).parent,
        Path("/usr/lib"),
    ]
    places += [Path("/"), Path("/dev"), Path(pytest.__file__).parent, Path("/proc/self")]
    source = """
        import os
        failures = 0
        for place in {places!r}:
            try: open(os.path.join(place, {name!r}), "w").write("x")
            except OSError: failures += 1
        assert failures == {expected}, failures
        os.utime(os.__file__)
    """
    written = public / name
    assert does_it_outside(source.format(places=[str(public)], name=name, expected=0))
    assert written.exists()
    written.unlink()
    outcome = run(source.format(places=list(map(str, places)), name=name, expected=len(places)))
    assert outcome.reason.startswith("failed: OSError: [Errno 30] Read-only file system")
    assert not any((place / name).exists() for place in places)


@sandboxed
@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_a_server_sees_no_connection(family: str, name: str) -> None:
    """On loopback, and on the sockets of Linux that have a name but no file."""
    with socket.socket(getattr(socket, family)) as server:
        server.bind(("127.0.0.1", 0) if family == "AF_INET" else f"\0{name}")
        server.listen()
        server.settimeout(0.2)
        address = server.getsockname()
        source = f"import socket; socket.socket(socket.{family}).connect({address!r})"
        assert does_it_outside(source)
        server.accept()[0].close()
        outcome = run(source)
        with pytest.raises(TimeoutError):
            server.accept()
    expected = {"AF_INET": "PermissionError: [Errno 1]", "AF_UNIX": "ConnectionRefusedError"}
    assert outcome.reason.startswith(f"failed: {expected[family]}")


@sandboxed
@pytest.mark.parametrize("family", [10, 16, 17, 38, 40])  # IPv6, netlink, packet, crypto, vsock
def test_no_socket_leaves_the_machine(family: int) -> None:
    outcome = run(f"import socket; socket.socket({family}, 3)")
    assert outcome.reason == "failed: PermissionError: [Errno 1] Operation not permitted"


@sandboxed
def test_nobody_outside_can_be_killed() -> None:
    source = """
        import os
        for process in (1, os.getppid(), {victim}, {test}, -1):
            try: os.kill(process, 9)
            except OSError: pass
        try: os.kill({victim}, 0)
        except ProcessLookupError: pass
        else: raise AssertionError("seen")
    """
    with subprocess.Popen(["sleep", "600"]) as victim:
        outcome = run(source.format(victim=victim.pid, test=os.getpid()))
        assert victim.poll() is None
        os.kill(victim.pid, signal.SIGKILL)
    assert outcome == Outcome(True, "passed")


@sandboxed
def test_a_daemon_does_not_survive(name: str) -> None:
    daemon = """
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                {named}
                os.write(write, b"born")
                time.sleep(600)
            os._exit(0)
        os.wait()
        os.read(read, 4)
        time.sleep({seconds})
    """
    source = "import os, time" + textwrap.dedent(daemon)
    named = calls_itself(name).strip()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, source.format(named=named, seconds=1))
        seen = False
        while not running.done():
            seen = seen or bool(alive(name))
            time.sleep(0.02)
    assert running.result() == Outcome(True, "passed")
    assert seen
    assert alive(name) == []


@sandboxed
def test_whoever_kills_the_caller_ends_the_program(name: str) -> None:
    source = f"import sandbox; sandbox.run_program({calls_itself(name) + 'time.sleep(600)'!r})"
    folder = sandbox.INSIDE.parent
    with subprocess.Popen([sys.executable, "-B", "-c", source], cwd=folder) as caller:
        assert wait_until(lambda: bool(alive(name)))
        caller.kill()
    assert wait_until(lambda: not alive(name))


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Less than the 10 seconds after which the sandbox ends a program anyway."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@sandboxed
def test_what_is_printed_is_dropped() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = "import os\nfor _ in range(4096): os.write(1, block); os.write(2, block)"
    assert run("block = b'x' * (1 << 20)\n" + source) == Outcome(True, "passed")  # 8 GiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@sandboxed
def test_whoever_fills_the_pipe_of_the_report_waits() -> None:
    source = """
        import os, stat
        pipes = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
        pipes = [fd for fd in pipes if stat.S_ISFIFO(os.fstat(fd).st_mode)]
        while True: os.write(pipes[0], b"x" * 4096)
    """
    assert run(source, seconds=1) == Outcome(False, "timed out")


@sandboxed
def test_a_program_has_no_rights() -> None:
    source = """
        import ctypes, os
        status = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines())
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"
        assert os.getresuid() == os.getresgid() == (65534,) * 3
        libc = ctypes.CDLL(None)
        for namespace in (0x10000000, 0x00020000, 0x20000000, 0x40000000):  # user, mount, pid, net
            assert libc.unshare(namespace) == -1, namespace
        assert libc.mount(b"x", b"/tmp", b"tmpfs", 0, None) == -1
        assert libc.umount2(b"/tmp", 2) == -1
        try: os.setuid(0)
        except OSError: pass
        else: raise AssertionError("root")
    """
    assert run(source) == Outcome(True, "passed")


@sandboxed
def test_several_threads() -> None:
    sources = [f"raise ValueError({i})" if i % 2 else "pass" for i in range(12)]
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(run, sources))
    expected = [f"failed: ValueError: {i}" if i % 2 else "passed" for i in range(12)]
    assert [outcome.reason for outcome in outcomes] == expected


@sandboxed
def test_the_same_program_has_the_same_outcome() -> None:
    order = "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))"
    assert run(order) == run(order)


@sandboxed
def test_the_smallest_memory_is_enough_for_the_interpreter() -> None:
    assert run("import re, typing, collections", memory_mib=sandbox.SMALLEST_MEMORY).passed


def test_without_bubblewrap_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    why = refusal()
    assert why is not None
    assert why.startswith("Programs are sandboxed by bubblewrap, which is not installed; ")
    assert "run apt-get install bubblewrap libseccomp2" in why
    with pytest.raises(OSError, match="run apt-get install bubblewrap"):
        run_program("pass")


def test_where_bubblewrap_is_not_allowed_it_says_why(
    monkeypatch: pytest.MonkeyPatch, public: Path
) -> None:
    (public / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    (public / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{public}:{os.environ['PATH']}")
    assert "cannot be sandboxed on this machine (bwrap: No permissions); run " in str(refusal())


@sandboxed
def test_what_bubblewrap_says_is_told_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DEVICES", ("/dev/nowhere",))
    assert "Can't find source path /dev/nowhere" in (refusal() or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0}, r"seconds must be a positive number, got 0\."),
        ({"seconds": float("inf")}, r"seconds must be a positive number, got inf\."),
        ({"memory_mib": 8}, r"memory_mib must be at least 64, got 8\."),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_program("pass", **arguments)
