"""Runs pytest in forks of one process that has imported torch, which takes seconds every time.

Started as a script, so that nothing of ours is imported before the fork: every run imports the tree as a new process
would. Reads one JSON object a line, {"arguments", "directory", "environment", "output", "deadline_s"}, and answers each
with the exit code of the run on a line: minus a signal's number if that ended it, SIGKILL at the deadline. Ends when
its standard input does.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

import jinja2  # noqa: F401
import pytest  # noqa: F401
import torch  # noqa: F401

POLL_S = 0.01


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this, and ends its input
    answers = os.fdopen(os.dup(1), "w")
    gc.freeze()  # or every run would look through all of torch for what to collect
    for line in iter(sys.stdin.readline, ""):
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            return run(task)
        print(_exit_code(pid, task["deadline_s"]), file=answers, flush=True)
    return None


def run(task: dict[str, Any]) -> None:
    """Become what `python -m pytest` would be: with this directory, environment and output."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["directory"])
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(task["output"], os.O_WRONLY | os.O_CREAT)
    for source, descriptor in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, descriptor)
    search = task["environment"]["PYTHONPATH"].split(os.pathsep)
    sys.path[:1] = [task["directory"], *(path for path in search if path not in sys.path)]
    sys.argv = ["pytest", *task["arguments"]]
    runpy.run_module("pytest", run_name="__main__", alter_sys=True)


def _exit_code(pid: int, deadline_s: float) -> int:
    """Wait for a process; kill it at its deadline."""
    deadline = time.monotonic() + deadline_s
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    main()
