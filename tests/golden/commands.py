"""Command lines of taid in processes forked from one that has the libraries, so that each begins at once, from nothing.

Of taid this knows `taid.__main__.run` alone.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from multiprocessing import connection
from pathlib import Path

PRELOADED = (
    "trl.trainer.sft_trainer transformers.trainer transformers.models.llama.modeling_llama datasets peft "
    "torch.testing matplotlib.figure matplotlib.backends.backend_agg taid.__main__"
).split()
AT_ONCE = 2
LOG = "log"


def do(jobs):
    """Do jobs, of which each is a folder and command lines that are run in it one after another; two jobs at a time.

    A command line is a list of words and the name of the checkpoint at which it is to kill itself, or None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = deque(jobs), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            process = context.Process(target=_do_one, args=waiting.popleft())
            process.start()
            running[process.sentinel] = process
        for sentinel in connection.wait(list(running)):
            running.pop(sentinel).join()


def failure(folder):
    """Why the job of a folder has failed, or None."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return None if lines[-1:] == ["done"] else "\n".join(["the command line has failed:", *lines[-15:]])


def _do_one(folder, command_lines):
    os.chdir(folder)
    with Path(LOG).open("a") as log:
        os.dup2(log.fileno(), 2)
        for number, (words, killed_at) in enumerate(command_lines):
            pid = os.fork()
            if pid == 0:
                _run(words, killed_at, Path(f"out{number}"))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status != (-signal.SIGKILL if killed_at else 0):
                print(f"{' '.join(words)} ended with {status}", file=log)
                return
        print("done", file=log)


def _run(words, killed_at, out):
    def watch(event, given):
        if given and isinstance(given[0], str) and killed_at in given[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        with out.open("w") as file:
            os.dup2(file.fileno(), 1)
        if killed_at:
            sys.addaudithook(watch)
        from taid.__main__ import run

        status = run(words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
