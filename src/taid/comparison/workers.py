"""Run jobs in processes that are forked from one with loaded libraries, so that each starts at once."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

# A name, a module-level function and its arguments.
Job = tuple[str, Callable[..., None], tuple[Any, ...]]


def preload(processes: int) -> Any:
    """Begin to load the libraries in the process that jobs are forked from, while the caller loads its own.

    Args:
        processes: the number of jobs at a time, which share the processor's cores.

    Returns:
        The context of multiprocessing in which jobs start: forked where the system can, else begun anew.
    """
    # The process that is forked reads it when it loads the libraries.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["taid.comparison.preload"])
    forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


class Workers:
    """Run jobs in a limited number of processes, and stop at the first that fails.

    Args:
        logs: the folder of the jobs' output, NAME.log each.
        processes: the number of jobs at a time; they share the processor's cores, and the GPUs.
    """

    def __init__(self, logs: Path, processes: int) -> None:
        self.logs, self.processes = logs, processes
        self.context = preload(processes)

    def do(self, jobs: list[Job]) -> None:
        """Run all jobs and return when they are done.

        Raises:
            ValueError: a job has failed; says why. The others are told to save and stop.
        """
        waiting, running, done = deque(jobs), dict[int, tuple[Any, str, int, Any]](), 0
        before = signal.signal(signal.SIGTERM, _stop) if threading.current_thread() is threading.main_thread() else None
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    name, work, given = waiting.popleft()
                    place = min(set(range(self.processes)) - {place for _, _, place, _ in running.values()})
                    ours, theirs = self.context.Pipe(duplex=False)
                    log = self.logs / f"{name}.log"
                    process = self.context.Process(target=_begin, args=(ours, log, place, work, given), name=name)
                    process.start()
                    ours.close()
                    running[process.sentinel] = process, name, place, theirs
                for sentinel in [ready for ready in connection.wait(list(running)) if isinstance(ready, int)]:
                    process, name, _, theirs = running.pop(sentinel)
                    process.join()
                    theirs.close()
                    if process.exitcode:
                        raise ValueError(f"{name} has failed: {self._why(name, process.exitcode)}")
                    done += 1
                    print(f"[{done}/{len(jobs)}] {name}", flush=True)
        finally:
            for process, _, _, _ in running.values():
                process.terminate()
            for process, _, _, _ in running.values():
                process.join()
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def _why(self, name: str, status: int) -> str:
        log = self.logs / f"{name}.log"
        if status < 0:  # its log does not say so
            why = " (the system does so where memory runs out: try fewer --processes)" if status == -9 else ""
            return f"it was killed by signal {-status}{why} ({log})"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"status {status}"]
        return f"{lines[-1].removeprefix('taid: error: ')} ({log})"


def _stop(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)  # jobs are told to stop, and save


def _begin(parent: Any, log: Path, place: int, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    """Run a job in its own process: write to its log, and exit if the parent process ends."""

    def watch() -> None:
        with contextlib.suppress(OSError, EOFError):
            parent.recv()
        os._exit(1)  # nobody waits for this run, and another comparison may have started it again

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=watch, daemon=True).start()
    import torch

    if devices := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[place % devices]  # read when CUDA is first used
    logging.basicConfig(format="%(message)s")
    try:
        work(*given)
    except Exception as error:  # any error becomes the last line of the log
        traceback.print_exc()
        sys.exit(f"taid: error: {' '.join(str(error).split())}")
