"""Bytecode of what processes import, compiled on all cores before they start.

Sixteen engines that import vLLM at once would each compile the same thousands of files, on one core each.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

DEADLINE_S = 60.0


def compile_packages(packages: Sequence[str], env: dict[str, str]) -> str:
    """Compile packages, where their bytecode is missing or older than its source; what is not installed is left out.

    Args:
        packages: their names. They are not imported.
        env: of the processes that will import them; it says where bytecode goes.

    Returns what went wrong, empty where nothing did. A file that cannot be compiled is left to whoever imports it.
    """
    found = [spec.origin for spec in map(find_spec, packages) if spec and spec.origin]
    folders = [os.path.dirname(origin) for origin in found]
    if "PYTHONPYCACHEPREFIX" not in env:  # it goes beside the sources
        folders = [folder for folder in folders if os.access(folder, os.W_OK)]
    if not folders:
        return "can't be compiled ahead: nothing may be written beside the sources"
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "compileall", "-qq", "-j", str(cores), *folders]
    try:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        return f"could not be compiled ahead ({error})"
    try:
        process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        return f"was not compiled within {DEADLINE_S:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return ""
