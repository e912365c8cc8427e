"""What a run leaves: run.json after every test, report.html at the end, and where its time went.

run.json is pytest-benchmark's own JSON with the sections `schema`, `environment`, `conformance` and `timeline`,
and with `calls`, what the calls that processes have answered took together by class and method, and `slow_calls`,
those of them that took longer than SLOW_CALL_S. A call that was never answered, as by a process that died, is in
neither.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reports.load import SCHEMA
from suite.processes.call import Call
from suite.session import environment

TRIED = pytest.StashKey[dict[str, int]]()  # what a test has tried and how often
PACES = pytest.StashKey[dict[str, dict[str, Any]]]()  # by stage: the host's pace, once an engine has measured it
TOLERANCES = pytest.StashKey[dict[str, str]]()  # by engine: how far cold ones answer apart, where they do
SLOW_CALL_S = 1.0
RUN, JUNIT, PAGE, LOGS = "run.json", "junit.xml", "report.html", "logs"


@dataclass
class Record:
    """The record of one run, kept in `directory`.

    stale_waivers: what --waivers should not hold as it does, known at the end.
    problems: what could not be written, each once; never a reason for a run to end.
    """

    directory: Path
    config: pytest.Config
    conformance: list[dict[str, Any]] = field(default_factory=list)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    slow_calls: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[str, dict[str, float]] = field(default_factory=dict)
    stale_waivers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._fixed: dict[str, Any] | None = None
        self.began = False

    def begin(self) -> None:
        """Remove what an earlier run left in the directory, and write what is known already."""
        self.began = True
        with self._tolerating("prepare", self.directory):
            logs = self.directory / LOGS
            logs.mkdir(parents=True, exist_ok=True)
            for old in [*logs.glob("*.log"), *(self.directory / name for name in (RUN, JUNIT, PAGE))]:
                old.unlink(missing_ok=True)
        self.write()

    @contextlib.contextmanager
    def span(self, what: str, name: str) -> Iterator[None]:
        """Put down how long the block takes: what is "starting", "moving" or "judging"; name says which."""
        began = time.monotonic()
        try:
            yield
        finally:
            elapsed_s = round(time.monotonic() - began, 3)
            entry = {"what": what, "name": name, "elapsed_s": elapsed_s, "began_s": round(began - self.started_s, 3)}
            with self._lock:
                self.timeline.append(entry)

    def answered(self, call: Call) -> None:
        """Put down what a call took, its time in the queue included; from any thread."""
        elapsed_s, began_s = round(call.elapsed_s(), 3), round(call.started_at - self.started_s, 3)
        kind = f"{call.process.target.partition(':')[2]}: {call.what}"
        with self._lock:
            of_its_kind = self.calls.setdefault(kind, {"count": 0, "elapsed_s": 0.0})
            of_its_kind["count"] += 1
            of_its_kind["elapsed_s"] = round(of_its_kind["elapsed_s"] + elapsed_s, 3)
            if elapsed_s >= SLOW_CALL_S:
                entry = {"call": call.what, "process": call.process.name, "began_s": began_s, "elapsed_s": elapsed_s}
                self.slow_calls.append(entry)

    def document(self) -> dict[str, Any]:
        """The content of run.json as of now."""
        session = self.config._benchmarksession
        if self._fixed is None:
            hook = self.config.hook
            self._fixed = {
                "machine_info": session.get_machine_info(),
                "commit_info": hook.pytest_benchmark_generate_commit_info(config=self.config),
                "environment": environment.gather(),
            }
        document = self.config.hook.pytest_benchmark_generate_json(
            config=self.config,
            benchmarks=[measured for measured in session.benchmarks if measured.stats.data],  # not cut off in the first
            include_data=True,
            machine_info=self._fixed["machine_info"],
            commit_info=self._fixed["commit_info"],
        )
        for measured in document["benchmarks"]:
            params = measured["params"] or {}
            measured["params"] = {name: getattr(value, "name", value) for name, value in params.items()}
        with self._lock:
            ours = {"conformance": list(self.conformance), "timeline": list(self.timeline)}
            calls = {kind: dict(found) for kind, found in self.calls.items()}
            ours |= {"calls": calls, "slow_calls": list(self.slow_calls)} if calls else {}
        ours |= {"stale_waivers": self.stale_waivers} if self.stale_waivers else {}
        paces = self.config.stash.get(PACES, {})
        gathered = self._fixed["environment"] | ({"pace": paces} if paces else {})
        tolerances = self.config.stash.get(TOLERANCES, {})
        gathered |= {"cold_answers": dict(tolerances)} if tolerances else {}
        return {**document, "schema": SCHEMA, "environment": gathered, **ours}

    def write(self) -> dict[str, Any]:
        """Write run.json, whole or not at all, and return its content."""
        document, path = self.document(), self.directory / RUN
        with self._tolerating("write", path):
            partial = path.with_suffix(".json.partial")
            partial.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
            os.replace(partial, path)
        return document

    def write_page(self, document: dict[str, Any]) -> None:
        """Write report.html."""
        path = self.directory / PAGE
        with self._tolerating("write", path):
            import reports

            reports.write_html(document, path)

    def artefacts(self) -> list[str]:
        """The names of what was written, files and the directory of logs."""
        return [name for name in (PAGE, RUN, JUNIT, LOGS) if (self.directory / name).exists()]

    @contextlib.contextmanager
    def _tolerating(self, what: str, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            problem = f"could not {what} {path}: {type(error).__name__}: {error}"
            if problem not in self.problems:
                self.problems.append(problem)
