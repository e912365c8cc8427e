"""pytest as a user runs it, with real engines: what is broken fails, and whatever ends a run, nothing is left of it."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from suite import ROOT
from suite.processes import janitor
from suite.selftest.runs import hear_ctrl_c
from suite.session import environment

JUDGING_S, STARTING_S, ENDING_S = 420, 150, 30
GONE_WITHIN_S = 10
HOPELESS_CASE_S = 12  # of an update that fails at once, with what comes before it
CONDEMNED = ("update.zeroed", "update.exact", "update.behaviour")
STAGE = "cpu-tp1"
NOTHING, HOPELESS = "LoadsNothing", ("RaisesInEveryUpdate", "HangsInEveryUpdate", "ReceivesNothing")

pytestmark = pytest.mark.skipif(environment.lacks_engine("cpu") is not None, reason="there is no vLLM for CPUs here")


class Session:
    """A run of pytest in a process of its own, whose output is read as it comes."""

    def __init__(self, report: Path, *arguments: str) -> None:
        self.report = report
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--report={report}", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output.append(line)
            print(line, end="")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(ENDING_S)
        self._reader.join(ENDING_S)

    def wait_for(self, pattern: str, deadline_s: float) -> None:
        """Wait until the output has a line like this."""
        deadline = time.monotonic() + deadline_s
        while not any(re.search(pattern, line) for line in self.output):
            assert self.process.poll() is None, f"expected {pattern!r}, found the end: {''.join(self.output[-30:])}"
            assert time.monotonic() < deadline, f"expected {pattern!r} within {deadline_s} s, found {self.output[-5:]}"
            time.sleep(0.05)

    def document(self) -> dict:
        return json.loads((self.report / "run.json").read_text())


@dataclass(frozen=True)
class Belongings:
    """What a run has while it lasts."""

    run_id: str
    pids: set[int]
    memory: set[Path]

    @classmethod
    def of(cls, session: Session) -> "Belongings":
        """Those of pytest's descendants, which have the run's id in their environment, and of the janitor."""
        running = janitor.running()
        pids = {session.process.pid}
        while more := {found.pid for found in running if found.parent in pids} - pids:
            pids |= more
        marks = [re.search(rb"WEIGHT_SYNC_RUN_ID=(\w+)", found.environment) for found in running if found.pid in pids]
        (run_id,) = {mark[1].decode() for mark in marks if mark}
        pids |= janitor.members(run_id)
        return cls(run_id, pids, janitor.shared_memory_of(pids))

    def left(self, before: set[Path]) -> dict[str, list]:
        """What is still there of it, and what is new in shared memory, or a new socket, that no process holds."""
        running = {found.pid for found in janitor.running()}
        new = {path for path in janitor.SHARED_MEMORY.iterdir() if path not in before}
        bound = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
        mine = {path for path in new if path in self.memory or self.run_id in path.name}
        left = {
            "processes": sorted(running & (self.pids | janitor.members(self.run_id))),
            "shared memory": sorted(map(str, mine | (new - janitor.shared_memory_of(running)))),
            "sockets": sorted(str(path) for path in sockets() - before if str(path) not in bound),
            "directories": list(Path(tempfile.gettempdir()).glob(f"ws-{self.run_id}-*")),
        }
        return {what: found for what, found in left.items() if found}


def sockets() -> set[Path]:
    """Where vLLM binds some, if it is not told where."""
    return {path for path in Path(tempfile.gettempdir()).iterdir() if path.is_socket()}


def there() -> set[Path]:
    """What a run may leave something among."""
    return {*janitor.SHARED_MEMORY.iterdir()} | sockets()


def expect_nothing_left(belongings: Belongings, before: set[Path]) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := belongings.left(before)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"expected nothing of run {belongings.run_id} after {GONE_WITHIN_S} s, found {left}"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A run that has ended, of the reference, one that loads nothing, and those of which no update succeeds."""
    extensions = [f"--extension=suite.selftest.mutants:{name}" for name in (NOTHING, *HOPELESS)]
    of_weights = f"(broadcast or {NOTHING}) and (zeroed or exact or behaviour)"
    in_time = f"({' or '.join(HOPELESS)}) and (exact or errors or stopped or sequence or order)"
    arguments = ("--subject=broadcast", *extensions, f"--stage={STAGE}", "--tb=no", "-k", f"{of_weights} or {in_time}")
    with Session(tmp_path_factory.mktemp("judged"), *arguments) as session:
        assert session.process.wait(JUDGING_S) == pytest.ExitCode.TESTS_FAILED
    return session


def test_an_extension_that_loads_nothing_fails_where_the_reference_passes(judged: Session):
    entries = [entry for entry in judged.document()["conformance"] if entry["subject"] in ("broadcast", NOTHING)]
    verdicts = {(entry["subject"], entry["requirement"]): (entry["verdict"], entry["detail"]) for entry in entries}
    for requirement in CONDEMNED:
        assert verdicts.pop(("broadcast", requirement)) == ("pass", "")
        verdict, detail = verdicts.pop((NOTHING, requirement))
        assert verdict == "fail"
        assert "expected" in detail, f"expected a detail that says why, found {detail!r}"
        assert f"[subject={NOTHING} stage={STAGE} model=qwen3-tied-tiny]" in detail
    assert not verdicts, "expected nothing else to be judged"


def test_subjects_of_which_no_update_succeeds_fail_in_time_and_for_one_reason_each(judged: Session):
    """One raises, one hangs, one returns without receiving: the trainer is never waited for beyond two seconds."""
    entries = judged.document()["conformance"]
    for name in HOPELESS:
        own = [entry for entry in entries if entry["subject"] == name]
        assert {entry["verdict"] for entry in own} == {"fail"}, "expected nothing but fails, and no error"
        assert len(own) == 9, f"expected every case to be judged, found {[entry['requirement'] for entry in own]}"
        took_s = sorted(entry["duration_s"] for entry in own)
        assert took_s[-3] < HOPELESS_CASE_S, f"expected all cases of {name} but two to be short, found {took_s}"
        if name == "HangsInEveryUpdate":
            assert took_s[-3] == 0, f"expected it to be given up after two, found {took_s}"
    told = re.split(r"=+ (?:weight sync|short test summary info) =+", "".join(judged.output))[1]
    found = " ".join(told.split()).count("all engines ended the update, and 2 s later it was still being sent")
    assert found == 1, f"expected the report to name the cause of ReceivesNothing once, found it {found} times"


def test_a_run_that_is_killed_leaves_nothing(tmp_path: Path):
    """Killed while one engine moves weights through shared memory and another starts."""
    before = there()
    with Session(tmp_path, "--subject=colocate", "--stage=cpu-tp2", "-k", "exact or repeated") as session:
        session.wait_for(r"engine .* ready after", STARTING_S)
        time.sleep(1)
        belongings = Belongings.of(session)
        assert len(belongings.pids) >= 5, "expected pytest, a janitor, an engine and its two workers at least"
        assert belongings.memory, "expected an engine of two ranks to have shared memory"
        session.process.send_signal(signal.SIGKILL)
        session.process.wait(ENDING_S)
        expect_nothing_left(belongings, before)
    assert session.document()["schema"] == 1


def test_a_run_that_is_interrupted_leaves_nothing_but_its_report(tmp_path: Path):
    before = there()
    with Session(tmp_path, "--subject=broadcast", "--stage=cpu-tp1", "-k", "exact or repeated") as session:
        session.wait_for(r"engine .* ready after", STARTING_S)
        belongings = Belongings.of(session)
        session.process.send_signal(signal.SIGINT)
        assert session.process.wait(ENDING_S) == pytest.ExitCode.INTERRUPTED
        expect_nothing_left(belongings, before)
    assert session.document()["schema"] == 1
    assert "Artefacts in" in "".join(session.output)
