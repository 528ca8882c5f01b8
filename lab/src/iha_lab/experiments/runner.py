"""Runs of an experiment, each in a process of its own: a crash takes no other run with it.

    OUTPUT/config.yaml          the sweep
    OUTPUT/results.jsonl        a line for each finished run, in the sweep's order
    OUTPUT/runs/NAME/           config.yaml, log.txt, what the run keeps to continue, record.json

Called again, finished runs are not run again, and the others continue from their checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from iha_lab.console import Console
from iha_lab.experiments import records
from iha_lab.experiments.config import Run, Sweep
from iha_lab.experiments.records import Record
from iha_lab.experiments.summary import best
from iha_lab.files import write_text
from iha_lab.machine import default_device, machine, rank
from iha_lab.run_folder import claim


def run_all(
    sweep: Sweep,
    output: Path,
    console: Console,
    *,
    jobs: int | None = None,
    command: Sequence[str] = (sys.executable, "-m", "iha_lab.experiments"),
) -> dict[str, str]:
    """Do what is not done yet; return the name of each run that failed, with its last words.

    `jobs` runs go side by side, by default one per core where there is no GPU and one where there
    is. `command`, given a run's folder, does that run.

    Raises ValueError if `output` holds another experiment, or something else.
    """
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}.")
    settings = sweep.model_dump(mode="json")
    with claim(output, settings, record="config.yaml", free=sweep.AXES), _polite_kill():
        failed = _run_all(sweep.tuning_runs(), output, console, jobs, command)
        return failed | _run_all(_chosen(sweep, output), output, console, jobs, command)


def _chosen(sweep: Sweep, output: Path) -> list[Run[Any]]:
    """Return the runs at the values that the tuning seeds chose, where there are tuning seeds.

    An attention of which a tuning run failed waits until that one is done.
    """
    if sweep.SELECT is None or not sweep.tuning_seeds:
        return sweep.runs()
    done = {record.name: record for record in records.read(output / records.FILE)}
    tuning: dict[str, list[Run[Any]]] = {}
    for run in sweep.tuning_runs():
        tuning.setdefault(run.compared, []).append(run)
    ready = {
        key: best([(run, done[run.name]) for run in runs])
        for key, runs in tuning.items()
        if all(run.name in done for run in runs)
    }
    axis = sweep.SELECT[0]
    return [r for r in sweep.runs() if r.compared in ready and r.on(axis) == ready[r.compared]]


def _run_all(
    chosen: list[Run[Any]], output: Path, console: Console, jobs: int, command: Sequence[str]
) -> dict[str, str]:
    runs = {run.name: run for run in chosen}
    finished = _finished(output, runs)
    pending = [name for name in runs if name not in finished]
    if len(pending) < len(runs):
        console.say(f"{len(runs) - len(pending)} of {len(runs)} runs are finished already.")
    failed: dict[str, str] = {}
    tell, processes = console.steps("runs", len(runs)), _Processes()
    tell(len(runs) - len(pending), "")

    def one(name: str) -> str | None:
        folder = output / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        runs[name].config().write(folder / "config.yaml")
        return processes.run([*command, str(folder)], folder / "log.txt", console, name, jobs)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(one, name): name for name in pending}
        try:
            for future in as_completed(waiting):
                name, words = waiting[future], future.result()
                finished = _finished(output, runs)
                if words is not None or name not in finished:
                    failed[name] = words or "it ended without a record"
                    console.say(f"{name} failed: {failed[name]}")
                tell(len(finished.keys() & runs.keys()), "")
        except KeyboardInterrupt:
            # Runs are asked to stop and leave a checkpoint; those not begun never begin.
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


def _finished(output: Path, runs: Collection[str]) -> dict[str, Record]:
    """Collect the records of all finished runs, and write them to results.jsonl."""
    found = {record.name: record for record in records.read(output / records.FILE)}
    for name in runs:
        own = output / "runs" / name / "record.json"
        if name not in found and own.exists():
            found[name] = Record.model_validate_json(own.read_text(encoding="utf-8"))
    order = [name for name in runs if name in found]
    others = [name for name in found if name not in runs]  # of an earlier, wider call
    records.write(output / records.FILE, [found[name] for name in order + others])
    return found


@contextlib.contextmanager
def _polite_kill() -> Generator[None]:
    """Take SIGTERM as Ctrl-C: it also reaches programs in the background of a script."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_one(run: Run[Any], folder: Path) -> None:
    """Do one run in this process: `record.json` into its folder, progress in JSON to stdout.

    Where a launcher started several processes for it, the first speaks and writes for all.
    """

    def progress(done: int, total: int, note: str) -> None:
        if rank() == 0:
            print(json.dumps({"done": done, "total": total, "note": note}), flush=True)

    start = time.perf_counter()
    result = run.run(folder, progress)
    if rank() != 0:
        return
    record = Record(
        name=run.name,
        config=run.config().model_dump(mode="json"),
        result=result,
        wall_seconds=round(time.perf_counter() - start, 2),
        machine=machine(default_device()),
    )
    write_text(
        folder / "record.json", json.dumps(record.model_dump(mode="json"), ensure_ascii=False)
    )


class _Processes:
    """The running ones, so that they can be asked to stop."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False
        self._lock = threading.Lock()

    def run(
        self, command: Sequence[str], log: Path, console: Console, name: str, jobs: int
    ) -> str | None:
        """Do one run; return its last words if it failed, else None."""
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        with log.open("w", encoding="utf-8") as errors:
            with self._lock:
                if self._stopping:
                    return "stopped"
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={"OMP_NUM_THREADS": threads, **os.environ},
                    start_new_session=True,  # Ctrl-C comes to us, and we pass it on once
                )
                self._running.add(process)
            with process:  # closes its pipe
                _follow(process, console, name)
            code = process.returncode
            with self._lock:
                self._running.discard(process)
        if code == 0:
            return None
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return f"{lines[-1] if lines else f'exit code {code}'} (all of it is in {log})"

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()  # a background process may ignore Ctrl-C


def _follow(process: subprocess.Popen[str], console: Console, name: str) -> None:
    """Pass on the progress that a run prints as JSON lines."""
    tell: Callable[[int, str], None] | None = None
    for line in process.stdout or ():
        try:
            told = json.loads(line)
            done, total, note = told["done"], told["total"], told["note"]
        except (ValueError, KeyError, TypeError):
            continue  # some library's own words
        if tell is None:
            tell = console.steps(name, total)
        tell(done, note)
