"""One process an architecture, forked from this one once vLLM is imported: a crash or a hang costs one row."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from suite.architectures.pictures.sitecustomize import let_torchvision_be_imported
from suite.processes.local import free_port

DEADLINE_S = 300
ENDING_S = 10
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
JUDGES = ("judge", "judge_reload")  # methods of Live
Task = tuple[str, str]  # (architecture, one of JUDGES)


def run(names: list[str], jobs: int, logs: Path) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Judge architectures, so many processes at a time; yields what each has found when it ends.

    That is what Live's method returns, or {"step", "kind", "message", "within"}: in which step what was raised, and
    the file of vLLM or of the extensions that it comes from. Logs go to `logs`.
    """
    _import_vllm()
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [(name, judge) for name in names for judge in JUDGES]
    running: dict[Connection, tuple[Task, multiprocessing.Process, list[Any]]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="ws-architectures-"))  # a killed process can't remove what it has written
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                receiving, process = _start(task, logs, scratch / "-".join(task))
                running[receiving] = (task, process, [])
            for receiving in wait(list(running), timeout=DEADLINE_S + ENDING_S):
                task, process, said = running[receiving]
                try:
                    said.append(json.loads(receiving.recv_bytes()))
                except EOFError:
                    del running[receiving]
                    process.join(ENDING_S)
                    shutil.rmtree(scratch / "-".join(task), ignore_errors=True)
                    yield task, _found(said, process)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.join(ENDING_S)
        shutil.rmtree(scratch, ignore_errors=True)


def _import_vllm() -> None:
    """Before the first fork, or every process would do it."""
    os.environ.update(VARIABLES)
    let_torchvision_be_imported()
    for name in ("vllm.engine.arg_utils", "vllm.model_executor.model_loader"):
        importlib.import_module(name)


def _start(task: Task, logs: Path, directory: Path) -> tuple[Connection, multiprocessing.Process]:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    forking = multiprocessing.get_context("fork")
    given = (task, sending, logs / f"{directory.name}.log", directory)
    process = forking.Process(target=_child, args=given, daemon=True)
    process.start()
    sending.close()
    return receiving, process


def _found(said: list[Any], process: multiprocessing.Process) -> dict[str, Any]:
    """What a process that has ended found, or how it ended."""
    if said and isinstance(said[-1], dict):
        return said[-1]
    code = process.exitcode
    ended = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
    message = f"no result within {DEADLINE_S} s" if ended == "SIGALRM" else f"the process ended by {ended}"
    return {"step": said[-1] if said else "start", "kind": "ProcessDied", "message": message, "within": ""}


def _child(task: Task, sending: Connection, log: Path, directory: Path) -> None:
    """Judge in this process, which the kernel ends at its deadline, whatever it is busy with."""
    signal.alarm(DEADLINE_S)
    os.setpgrp()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    steps: list[str] = []

    def say(what: Any) -> None:
        sending.send_bytes(json.dumps(what).encode())

    def entered(step: str) -> None:
        steps.append(step)
        say(step)

    directory.mkdir()
    try:
        say(_judged(task, directory, entered))
    except Exception as error:
        traceback.print_exc()
        say({"step": steps[-1] if steps else "start", **_told(error)})
    sending.close()


def _judged(task: Task, directory: Path, entered: Any) -> dict[str, Any]:
    import torch
    from vllm.model_executor.models import registry

    from suite.architectures.live import Live

    # vLLM imports a model's class in a process of its own first, and keeps the reason of a failure to its log.
    failures: list[Exception] = []

    def inspect(function: Any) -> Any:
        try:
            return function()
        except Exception as error:
            failures.append(error)
            raise

    registry._run_in_subprocess = inspect
    torch.set_num_threads(1)
    name, judge = task
    try:
        return getattr(Live(name, directory, free_port(), entered), judge)()
    except Exception as error:
        raise (failures or [error])[0] from error


def _told(error: Exception) -> dict[str, str]:
    """An error as plain data: its class, its first line, and the innermost file of vLLM or ours that it passed."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [name for name in frames if "/vllm/" in name or "/extensions/" in name]
    within = max(ours[-1:], default="")
    for package in ("vllm", "extensions"):
        if f"/{package}/" in within:
            within = f"{package}/" + within.rpartition(f"/{package}/")[2]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if not line.endswith("validation error for ModelConfig")), "")
    return {"kind": type(error).__name__, "message": told, "within": within}
