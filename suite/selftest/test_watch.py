"""A wait for a process that has died ends, and no other does."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from suite.actors import watch
from suite.actors.watch import Watch, WorkerDied

SOON_S = 10.0


@pytest.fixture
def worker() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch, worker: subprocess.Popen) -> Iterator[Watch]:
    monkeypatch.setattr(watch, "POLL_S", 0.05)
    monkeypatch.setattr(watch, "GRACE_S", 0.2)
    watching = Watch()
    watching.look_after([worker.pid])
    yield watching
    watching.close()


def wait_for_ever() -> None:
    assert threading.Event().wait(SOON_S), "nothing ended the wait"


def test_a_wait_ends_when_the_worker_is_killed_and_so_does_the_next(watching: Watch, worker: subprocess.Popen):
    threading.Timer(0.3, worker.kill).start()
    for _ in range(2):
        with pytest.raises(WorkerDied, match=f"process {worker.pid} has ended"), watching.waiting():
            wait_for_ever()


def test_what_waits_for_nothing_is_not_interrupted(watching: Watch, worker: subprocess.Popen):
    with watching.waiting():
        pass
    worker.kill()
    time.sleep(0.6)
    watching.close()
    with watching.waiting():
        time.sleep(0.6)


def test_as_long_as_the_worker_runs_a_wait_goes_on(watching: Watch):
    with pytest.raises(AssertionError, match="nothing ended the wait"), watching.waiting():
        assert threading.Event().wait(0.6), "nothing ended the wait"
