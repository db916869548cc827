"""Command lines of taid in processes forked from one that has the libraries, so that each begins at once, from nothing.

python tests/golden/commands.py jobs.json

A job is a folder, and command lines that run in it one after another; each has the words of it, and a checkpoint at
whose first file it kills itself, or null. What they say goes to out0, out1, ... and to `log` in that folder. Of taid
this knows `taid.__main__.run` alone.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

PRELOADED = (
    "trl.trainer.sft_trainer transformers.trainer transformers.models.llama.modeling_llama datasets peft scipy.io "
    "matplotlib.backends.backend_agg matplotlib.figure taid.__main__"
).split()
AT_ONCE = 2
LOG = "log"


def main(jobs):
    """Do all jobs, two at a time."""
    for name in PRELOADED:
        importlib.import_module(name)
    running = 0
    for folder, command_lines in jobs:
        if running == AT_ONCE:
            os.wait()
            running -= 1
        running += 1
        _forked(_do, folder, command_lines)
    for _ in range(running):
        os.wait()


def failure(folder):
    """Why the job of a folder has failed, or None."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return None if lines[-1:] == ["done"] else "\n".join(["the command line has failed:", *lines[-15:]])


def _forked(work, *given):
    """The id of a process that does it and ends."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        status = work(*given)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _do(folder, command_lines):
    os.chdir(folder)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    for number, (words, killed_at) in enumerate(command_lines):
        status = os.waitstatus_to_exitcode(os.waitpid(_forked(_run, number, words, killed_at), 0)[1])
        if status != (-signal.SIGKILL if killed_at else 0):
            print(f"{' '.join(words)} ended with {status}", file=sys.stderr)
            return 1
    if os.environ.get("TAID_GOLDEN_SECONDS"):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{used.ru_utime + used.ru_stime:.1f} s", file=sys.stderr)
    print("done", file=sys.stderr)
    return 0


def _run(number, words, killed_at):
    from matplotlib.figure import Figure

    from taid.__main__ import run

    def watch(event, given):
        if given and isinstance(given[0], str) and killed_at in given[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(f"out{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    gc.freeze()  # or each collection would go through all libraries
    Figure.savefig = lambda self, file, **options: None  # the pictures of a report take half of the time
    if killed_at:
        sys.addaudithook(watch)
    return run(words)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
