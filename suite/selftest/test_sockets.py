"""Where the sockets of a run lie, which nobody removes whose owner is killed, and what is left of them after it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from suite import ROOT
from suite.processes import janitor
from suite.processes.local import NAME_BYTES, SOCKET_BYTES, LocalLauncher

BINDER, DEADLINE_S, GONE_WITHIN_S = "suite.selftest.targets:Binder", 60, 10
UUID = "c7188393-b7f1-44f5-baf1-bfa7212a0deb"

HOST = """
import json, sys, time
from pathlib import Path
from suite.processes.local import LocalLauncher

launcher = LocalLauncher(Path(sys.argv[1]))
process = launcher.start("binder", "suite.selftest.targets:Binder")
bound = process.call("bind", launcher.id, deadline_s=20)
print(json.dumps({"bound": bound, "made": [str(launcher.directory), str(launcher.temporary)]}), flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["short", "long"])
def temporary(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files that pytest is given: one of which a socket's path is too long too."""
    folder = Path(tempfile.gettempdir()) if request.param == "short" else tmp_path / ("long" * 30)
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))  # pytest's own is not the processes'
    return folder


def test_sockets_of_a_run_that_is_killed_are_gone_with_it(temporary: Path, tmp_path: Path):
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path / "logs")], stdout=subprocess.PIPE, cwd=ROOT)
    found = json.loads(host.stdout.readline())
    sockets, made = [*map(Path, found["bound"])], {*map(Path, found["made"])}
    assert all(path.is_socket() for path in sockets)
    assert {path.parent for path in sockets} <= made | {Path("/tmp")}, "expected them in the run's own folders"
    assert len(made) == (1 if len(os.fsencode(temporary)) < SOCKET_BYTES - NAME_BYTES else 2)
    host.kill()
    host.wait(5)
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := [path for path in (*sockets, *made) if path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_every_path_of_a_run_is_short_enough_for_a_socket(temporary: Path, tmp_path: Path):
    with LocalLauncher(tmp_path / "logs") as launcher:
        for path in (launcher.link_path(), f"{launcher.temporary}/{UUID}"):
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path)
        assert launcher.scratch("snapshot").is_relative_to(temporary), "what is large goes where pytest is told"


def test_a_run_removes_no_file_of_its_id_but_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(janitor, "SOCKETS", tmp_path)
    own, others, file = (tmp_path / name for name in ("zmq-0123abcd-0.sock", "zmq-4567abcd-0.sock", "a-0123abcd-file"))
    for path in (own, others):
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    file.touch()
    janitor.sweep("0123abcd", [tmp_path / "none"], [])
    assert [path.exists() for path in (own, others, file)] == [False, True, True]
