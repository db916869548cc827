"""`taid ...` in a process of its own, forked from one that has the libraries: it begins at once, and from nothing else.

`python -m taid` itself is started by one test of test_runs.py, by test_cli.py, and where there are several processes.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing import connection, forkserver
from pathlib import Path

_LIBRARIES = (
    "taid.__main__ taid.training.trainer taid.evaluation.evaluate trl.trainer.sft_trainer torch._dynamo "
    "transformers.models.llama.modeling_llama matplotlib.backends.backend_agg"
).split()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_LIBRARIES)


class Command:
    """A command that has begun, with what a test needs of subprocess.Popen."""

    def __init__(self, words: Iterable[object], code: str | None = None, env: dict[str, str] | None = None) -> None:
        self.stdout = self.stderr = ""
        self._folder = Path(tempfile.mkdtemp(prefix="command-", dir=os.environ["HF_HOME"]))  # conftest.py removes it
        outputs = [self._folder / name for name in ("out", "err")]
        forkserver.ensure_running()
        server = forkserver._forkserver._forkserver_address
        given = ([str(word) for word in words], code, dict(env or os.environ), os.getcwd(), *outputs, server)
        self._outputs = outputs
        self._process = _context.Process(target=_begin, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if not connection.wait([self._process.sentinel], timeout):
            self.kill()
            raise TimeoutError(f"after {timeout} s: {self._outputs[1].read_text()[-3000:]}")
        self._process.join()
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        self.stdout, self.stderr = (path.read_text(encoding="utf-8", errors="replace") for path in self._outputs)
        return self.stdout, self.stderr


def run_taid(*words: object, env: dict[str, str] | None = None, timeout: float = 600) -> Command:
    """Run `taid` to its end; the result has `returncode`, `stdout` and `stderr`."""
    command = Command(words, env=env)
    command.communicate(timeout)
    return command


def _begin(words, code, environment, folder, out, err, server) -> None:
    """In the process that was forked: `python -m taid ...`, or `python -c code ...`."""
    # The runs of a comparison are forked from where this process was: a server of its own would load all libraries.
    forkserver._forkserver._forkserver_address = server
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
    gc.freeze()  # or each collection would go through all libraries
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.argv = ["taid", *words]
    if code:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    else:
        sys.exit(importlib.import_module("taid.__main__").run(words))
