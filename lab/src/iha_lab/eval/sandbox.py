"""Programs that a model wrote, run where they can do no harm.

Each runs in a child process with Linux namespaces of its own (`sandbox_child`): no network, no
processes but its own, and as file system only Python's and the system's libraries, read-only, and
a small folder in memory. Time, memory, files and processes are limited, the environment is empty,
what it prints is dropped. Nothing of it is left when the call returns.

A program passes if it comes to its last line. A random token says so, which is written after that
line: leaving early with status 0 does not pass. The token is no secret from a program that searches
its own interpreter; such a program could as well replace `==`.

The calls are those of libc, by ctypes: `os.unshare` came with Python 3.12, and the command
`unshare` builds no root folder and would start one more process for each step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("sandbox_child.py")
ENVIRONMENT = {
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # the same program, the same outcome
    "PYTHONNOUSERSITE": "1",
    "PYTHONSAFEPATH": "1",
}
SYSTEM = (
    *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib"),
    *("/etc/alternatives", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
)
PATIENCE = 10  # seconds in which a child that is not served by a loaded machine may still report
SMALLEST_MEMORY = 64  # MiB; the interpreter itself takes about half


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
    if sys.platform != "linux":
        raise OSError(f"Programs can be sandboxed on Linux only, this is {sys.platform}.")
    task = {
        "source": source,
        "seconds": seconds,
        "memory": memory_mib << 20,
        "visible": _visible(),
    }
    with subprocess.Popen(
        [sys.executable, CHILD],
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,  # away from the terminal, its input and its signals
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        try:
            output, errors = child.communicate(json.dumps(task).encode(), seconds + PATIENCE)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            child.terminate()  # and with it the whole process namespace; `with` waits for that
    match json.loads(output or "{}"):
        case {"ended": str(reason)}:
            return Outcome(reason == "passed", reason)
        case {"refused": str(why)}:
            raise OSError(
                f"Programs cannot be sandboxed on this machine ({why}); it takes Linux 5.12 or"
                " newer that allows user namespaces."
            )
        case _ if errors:
            said = errors.decode(errors="replace").splitlines()[-1]
            raise OSError(f"The sandbox failed: {said}.")
        case _:
            return Outcome(False, "killed by the system")


def refusal() -> str | None:
    """Why this machine cannot sandbox, in one sentence; None if it can: a program was run."""
    try:
        outcome = run_program("import math, random, re")
    except OSError as error:
        return str(error)
    return None if outcome.passed else f"A first sandboxed program did not pass: {outcome.reason}."


def _visible() -> dict[str, str]:
    """What a program sees of the file system: path inside, path outside without links."""
    python = [
        f"{prefix}/{lib}" for prefix in (sys.base_prefix, sys.prefix) for lib in ("lib", "lib64")
    ]
    found: dict[str, str] = {}
    for path in sorted({*SYSTEM, *python}):
        if os.path.exists(path) and not any(path.startswith(f"{shown}/") for shown in found):
            found[path] = os.path.realpath(path)
    return found


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Of `samples` programs, `correct` pass: the chance that one of k drawn at random does.

    1 − C(n−c, k) / C(n, k), without bias (Chen et al., arXiv 2107.03374).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def code_eval_compute(
    predictions: Sequence[Sequence[str]],
    references: Sequence[str],
    k: Sequence[int] = (1, 10, 100),
    num_workers: int = 4,
    timeout: float = 3.0,
    *,
    memory_mib: int = 1024,
) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
    """`compute` of the metric "code_eval" of `evaluate`, sandboxed.

    predictions: for each task the programs to try; references: for each task its tests.
    k: "pass@k" is given where every task has at least k programs.

    Returns {"pass@k": mean over the tasks} and {task: [(which program, what became of it), …]}.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            "predictions and references must hold one entry for each task, got"
            f" {len(predictions)} and {len(references)}."
        )
    runs = [
        (task, number, f"{program}\n{test}")
        for task, (programs, test) in enumerate(zip(predictions, references, strict=True))
        for number, program in enumerate(programs)
    ]
    with ThreadPoolExecutor(num_workers) as threads:
        outcomes = threads.map(
            lambda run: run_program(run[2], seconds=timeout, memory_mib=memory_mib), runs
        )
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {
            task: [] for task in range(len(predictions))
        }
        for (task, number, _), outcome in zip(runs, outcomes, strict=True):
            result = {"task_id": task, "completion_id": number, "passed": outcome.passed}
            results[task].append((number, result | {"result": outcome.reason}))
    counts = [(len(tried), sum(r["passed"] for _, r in tried)) for tried in results.values()]
    scores = {
        f"pass@{size}": sum(pass_at_k(n, c, size) for n, c in counts) / len(counts)
        for size in k
        if all(n >= size for n, _ in counts)
    }
    return scores, results
