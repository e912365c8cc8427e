"""Processes start, answer, fail and end as promised, and leave nothing behind whatever ends pytest."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from suite import ROOT
from suite.processes import janitor, local, pressure
from suite.processes import process as module
from suite.processes.call import DeadlineExceeded, NotBegun, Process, ProcessDied, RemoteError, Starved, gather
from suite.processes.local import LocalLauncher

ECHO = "suite.selftest.targets:Echo"
GONE_WITHIN_S = 10


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[LocalLauncher]:
    with LocalLauncher(tmp_path / "logs") as launcher:
        yield launcher


@pytest.fixture(scope="module")
def shared_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLauncher]:
    with LocalLauncher(tmp_path_factory.mktemp("shared") / "logs") as launcher:
        yield launcher


@pytest.fixture(scope="module")
def echo(shared_launcher: LocalLauncher) -> Process:
    """One process for the tests that leave it usable."""
    return start(shared_launcher, "echo")


def start(launcher: LocalLauncher, name: str = "worker", **kwargs: object) -> Process:
    process = launcher.start(name, ECHO, kwargs)
    process.ready(20)
    return process


def running(pid: int) -> bool:
    return any(found.pid == pid for found in janitor.running())


def wait_until_gone(pids: list[int], memory: list[str], directory: Path) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    left: tuple[object, ...] = ()
    while time.monotonic() < deadline:
        processes_left = [pid for pid in pids if running(pid)]
        memory_left = [name for name in memory if (janitor.SHARED_MEMORY / name).exists()]
        left = (processes_left, memory_left, directory.exists())
        if not any(left):
            return
        time.sleep(0.1)
    pytest.fail(f"after {GONE_WITHIN_S} s there are still (processes, shared memory, directory): {left}")


# ---- answers


def test_facts_and_results_come_back(echo: Process):
    assert echo.ready(5) == {"greeting": "hello", "pid": echo.pid}
    assert echo.call("echo", 1, "two", deadline_s=5, three=b"3") == [[1, "two"], {"three": b"3"}]


def test_large_arguments_and_results(echo: Process):
    blob = os.urandom(10_000_000)
    assert echo.call("echo", blob, deadline_s=20) == [[blob], {}]


def test_calls_are_served_one_at_a_time_in_order(echo: Process):
    calls = [echo.submit("echo", number) for number in range(20)]
    assert [result[0][0] for result in gather(calls, deadline_s=10)] == list(range(20))


@pytest.mark.parametrize("forbidden", [True, False])
def test_where_no_bytecode_may_be_written_beside_the_sources_it_goes_to_the_runs_folder(
    shared_launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch, forbidden: bool
):
    monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    process = shared_launcher.start("bytecode", ECHO)
    wanted = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": None}
    if forbidden:
        bytecode = shared_launcher.directory / "bytecode"
        wanted = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(bytecode)}
    assert {name: process.call("environment", name, deadline_s=20) for name in wanted} == wanted
    assert not forbidden or any(bytecode.rglob("*.pyc"))


def test_environment_is_pytests_own_with_changes(shared_launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WS_KEPT", "kept")
    monkeypatch.setenv("WS_REMOVED", "removed")
    process = shared_launcher.start("environment", ECHO, env={"WS_SET": "set", "WS_REMOVED": None})
    wanted = {"WS_KEPT": "kept", "WS_SET": "set", "WS_REMOVED": None, janitor.RUN_VARIABLE: shared_launcher.id}
    assert {name: process.call("environment", name, deadline_s=20) for name in wanted} == wanted


def test_output_goes_to_the_log_from_the_start(echo: Process):
    echo.call("say", "printed by the object", deadline_s=5)
    echo.call("write", "written past python\n", deadline_s=5)
    assert "constructing with hello" in echo.tail()
    assert "printed by the object\nprinted by the object\nwritten past python" in echo.tail()
    assert echo.tail(lines=1) == "written past python"


# ---- started ahead

AHEAD = "suite.selftest.targets:Ahead"


@pytest.fixture
def waiting(launcher: LocalLauncher) -> Process:
    """A process that has imported what its object needs."""
    process = launcher.ahead("spare", AHEAD, {"WS_LATE": "early", "WS_REMOVED": "here"})
    assert process.imported.result(20) == "imported"
    return process


def test_a_process_that_waits_is_given_its_variables_before_its_object_is_built(waiting: Process):
    waiting.begin("worker", {"greeting": "good day"}, {"WS_LATE": "late", "WS_REMOVED": None})
    expected = {"greeting": "good day", "imported_with": "early", "built_with": ["late", None]}
    assert waiting.ready(20) == expected
    assert waiting.call("environment", "WS_LATE", deadline_s=5) == "late"


def test_a_process_has_the_log_and_the_name_of_what_it_became(launcher: LocalLauncher, waiting: Process):
    other = launcher.ahead("spare", AHEAD)
    assert (other.name, other.log_path.name) == ("spare", "spare.2.log")
    assert waiting.used_s == 0, "expected a test that fails not to show the logs of processes that wait"
    for process, log in ((waiting, "worker.log"), (other, "worker.2.log")):
        process.begin("worker")
        process.ready(20)
        with pytest.raises(RemoteError, match=rf"in process worker: (.|\n)*{log}") as failed:
            process.call("fail", "no such weight", deadline_s=5)
        assert failed.value.process == "worker"
        assert process.tail().startswith("imported ahead\nconstructing with hello")
    assert sorted(path.name for path in launcher.logs.iterdir()) == ["worker.2.log", "worker.log"]
    assert waiting.used_s > 0


def test_a_process_that_has_died_as_it_waited_says_so(waiting: Process):
    os.kill(waiting.pid, signal.SIGKILL)
    waiting._popen.wait(5)
    waiting.begin("worker")
    with pytest.raises(ProcessDied, match=r"process worker was killed by SIGKILL; no answer to starting .*:Ahead"):
        waiting.ready(20)


def test_a_process_that_dies_as_it_begins_says_so(waiting: Process):
    os.kill(waiting.pid, signal.SIGSTOP)
    waiting.begin("worker")
    os.kill(waiting.pid, signal.SIGKILL)
    with pytest.raises(ProcessDied, match=r"process worker was killed by SIGKILL; no answer to starting .*:Ahead"):
        waiting.ready(20)


def test_a_process_that_waits_ends_when_it_is_stopped(waiting: Process):
    began = time.monotonic()
    waiting.stop(grace_s=10)
    assert (waiting.alive, waiting._popen.returncode) == (False, 0), "expected it to end by itself, as it was told"
    assert time.monotonic() - began < 8
    waiting.begin("worker")
    with pytest.raises(ProcessDied, match="process worker was stopped"):
        waiting.ready(5)


def test_what_descends_from_a_process_that_was_started_ahead_ends_with_it(waiting: Process):
    waiting.begin("worker")
    descendants = waiting.call("grandchildren", True, deadline_s=20)
    os.kill(waiting.pid, signal.SIGKILL)
    waiting.stop(grace_s=0)
    assert [pid for pid in descendants if running(pid)] == []


def test_arguments_that_are_not_plain_leave_no_process(launcher: LocalLauncher):
    with pytest.raises(TypeError, match=r"value\['kwargs'\]\['greeting'\], found builtins.object"):
        launcher.start("worker", ECHO, {"greeting": object()})
    assert [process.alive for process in launcher.processes] == [False]


# ---- failures


def test_a_remote_exception_arrives_as_text(echo: Process):
    with pytest.raises(RemoteError) as caught:
        echo.call("fail", "no such weight", deadline_s=5)
    assert (caught.value.kind, caught.value.message, caught.value.process) == ("LookupError", "no such weight", "echo")
    assert "in fail" in caught.value.traceback
    assert str(echo.log_path) in str(caught.value)
    assert echo.call("echo", deadline_s=5) == [[], {}]


def test_exit_within_a_call_is_an_error_not_the_end(echo: Process):
    with pytest.raises(RemoteError, match="SystemExit"):
        echo.call("leave", 3, deadline_s=5)
    assert echo.call("echo", deadline_s=5) == [[], {}]


def test_data_that_is_not_plain_is_refused_on_both_sides(echo: Process):
    with pytest.raises(TypeError, match=r"value\['args'\]\[0\], found builtins.object"):
        echo.submit("echo", object())
    with pytest.raises(RemoteError, match=r"value\['result'\]\['found'\]\[0\], found builtins.object"):
        echo.call("unsendable", deadline_s=5)


def test_a_failing_constructor_says_why(launcher: LocalLauncher):
    process = launcher.start("broken", ECHO, {"fail": "no weights here"})
    with pytest.raises(RemoteError) as caught:
        process.ready(20)
    assert caught.value.message == "no weights here"
    assert "in __init__" in caught.value.traceback
    assert "constructing with hello" in caught.value.__notes__[0]
    with pytest.raises(RemoteError, match="no weights here"):
        process.call("echo", deadline_s=5)


CORE = """\
(EngineCore pid=27) ERROR 12-01 05:01:17 [core.py:1231]     raise ValueError(f"Duplicate layer name: {prefix}")
(EngineCore pid=27) ERROR 12-01 05:01:17 [core.py:1231] ValueError: Duplicate layer name: 0.attn
(EngineCore pid=27)   File "core.py", line 3, in create
(EngineCore pid=27) ValueError: Duplicate layer name: 0.attn
RuntimeError goes back to pytest: Engine core initialization failed. See root cause above.
"""


def test_what_vllm_has_written_to_the_log_is_the_cause(echo: Process):
    echo.log_path.write_text(CORE)
    with pytest.raises(RemoteError) as caught:
        echo.call("fail", "Engine core initialization failed. See root cause above.", deadline_s=5)
    assert caught.value.cause == "ValueError: Duplicate layer name: 0.attn"
    assert caught.value.said.endswith("root cause above.\nits log says: ValueError: Duplicate layer name: 0.attn")
    with pytest.raises(RemoteError) as caught:
        echo.call("fail", "another", deadline_s=5)
    assert caught.value.cause == "LookupError: another"


@pytest.mark.parametrize("target", ["suite.selftest.no_such_module:Echo", "suite.selftest.targets:NoSuchClass"])
def test_a_missing_class_says_so(launcher: LocalLauncher, target: str):
    with pytest.raises(RemoteError, match=r"no_such_module|NoSuchClass"):
        launcher.start("missing", target).ready(20)
    early = launcher.ahead("early", target)
    with pytest.raises(RemoteError, match=r"no_such_module|NoSuchClass"):
        early.imported.result(20)
    early.begin("late")
    with pytest.raises(RemoteError, match=r"no_such_module|NoSuchClass"):
        early.ready(20)


def test_a_constructor_has_a_deadline(launcher: LocalLauncher):
    with pytest.raises(DeadlineExceeded, match=r"starting suite\.selftest\.targets:Echo in process slow"):
        launcher.start("slow", ECHO, deadline_s=0.001).ready(20)


def test_a_late_answer_raises_with_the_stacks(launcher: LocalLauncher):
    process = start(launcher)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        process.call("sleep", 30, deadline_s=0.5)
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert "sleep() in process worker has not answered after" in message
    assert 'targets.py", line' in message
    assert "in sleep" in message
    assert str(process.log_path) in message


def test_a_dead_process_fails_its_calls_and_later_ones(launcher: LocalLauncher):
    process = start(launcher)
    pending = [process.submit("vanish"), process.submit("echo")]
    for call in pending:
        with pytest.raises(ProcessDied, match=r"(?s)worker exited with code 7.*about to vanish"):
            call.result(10)
    assert not process.alive
    with pytest.raises(ProcessDied, match="exited with code 7"):
        process.call("echo", deadline_s=5)


def test_a_killed_process_with_living_descendants_is_noticed(launcher: LocalLauncher):
    process = start(launcher)
    process.call("hand_connection_down", deadline_s=10)
    pending = process.submit("sleep", 30)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessDied, match="was killed by SIGKILL"):
        pending.result(5)


def test_gather_raises_the_first_failure_and_tells_of_the_others(launcher: LocalLauncher):
    failing, hanging, fine = (start(launcher, name) for name in ("failing", "hanging", "fine"))
    calls = [hanging.submit("sleep", 30), failing.submit("fail", "bad tensor"), fine.submit("echo")]
    started = time.monotonic()
    with pytest.raises(RemoteError, match="bad tensor") as caught:
        gather(calls, deadline_s=20, after_failure_s=0.5)
    assert time.monotonic() - started < 5
    notes = "\n".join(caught.value.__notes__)
    assert "sleep() in process hanging has not answered after" in notes
    assert "echo() in process fine took" in notes


def test_gather_has_a_deadline(launcher: LocalLauncher):
    process = start(launcher)
    with pytest.raises(DeadlineExceeded, match="sleep"):
        gather([process.submit("echo"), process.submit("sleep", 30)], deadline_s=0.5)


def test_a_call_that_waits_behind_what_makes_the_process_ready_has_not_begun(launcher: LocalLauncher):
    process = start(launcher)
    process.prepare("sleep", 30)
    with pytest.raises(NotBegun, match=r"echo\(\) in process .* has not begun .* still busy with sleep"):
        process.call("echo", deadline_s=0.3)


def test_a_call_that_waits_behind_another_call_is_late(launcher: LocalLauncher):
    process = start(launcher)
    process.submit("sleep", 30)
    with pytest.raises(DeadlineExceeded, match=r"echo\(\) in process"):
        process.call("echo", deadline_s=0.3)


@pytest.mark.parametrize(
    ("stalled_us", "expected"), [(1_000_000, Starved), (1_000, DeadlineExceeded), (0, DeadlineExceeded)]
)
def test_a_call_is_not_late_where_the_host_was_short_of_memory(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stalled_us: int, expected: type
):
    monkeypatch.setattr(pressure, "MEMORY", tmp_path / "memory")
    says = "some avg10=0.00 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total={}\n".format
    pressure.MEMORY.write_text(says(5))
    process = start(launcher)
    call = process.submit("sleep", 30)
    call.awaited()
    pressure.MEMORY.write_text(says(5 + stalled_us))
    with pytest.raises(expected, match=r"sleep\(\) in process .* has not answered"):
        call.result(0.3)


def test_a_host_that_does_not_say_whether_it_is_short_of_memory_is_not(tmp_path: Path, monkeypatch):
    for said in (None, "", "some total=7"):
        monkeypatch.setattr(pressure, "MEMORY", tmp_path / "memory")
        if said is not None:
            pressure.MEMORY.write_text(said)
        assert pressure.stalled_s() == 0


def test_what_has_not_begun_comes_before_the_failures_of_those_that_waited_for_it(launcher: LocalLauncher):
    preparing, failing = start(launcher, "preparing"), start(launcher, "failing")
    preparing.prepare("sleep", 30)
    with pytest.raises(NotBegun) as caught:
        gather([failing.submit("fail", "nobody came"), preparing.submit("echo")], deadline_s=20, after_failure_s=0.3)
    assert "nobody came" in "".join(caught.value.__notes__)


# ---- ports


def test_a_port_is_free_and_outside_of_what_the_system_hands_out(launcher: LocalLauncher):
    for port in {launcher.free_port() for _ in range(50)}:
        assert local.PORTS[0] <= port < local.PORTS[1]
        with socket.create_server((launcher.address, port)):
            pass


def test_a_port_that_is_taken_is_not_given(launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server((launcher.address, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(local, "PORTS", (port, port + 1))
        with pytest.raises(OSError, match=f"no port of {port}"):
            launcher.free_port()


def test_paths_are_given_once(launcher: LocalLauncher):
    assert launcher.link_path() != launcher.link_path()
    assert launcher.scratch("snapshot") != launcher.scratch("snapshot")
    assert launcher.scratch("snapshot").parent == launcher.directory


# ---- ends


def test_stop_ends_descendants_and_their_shared_memory(launcher: LocalLauncher):
    process = start(launcher)
    pids = [process.pid, *process.call("grandchildren", True, deadline_s=10)]
    memory = [process.call(kind, deadline_s=10) for kind in ("shared_memory", "semaphore")]
    assert all((janitor.SHARED_MEMORY / name).exists() for name in memory)
    process.stop(grace_s=0.5)
    assert [pid for pid in pids if running(pid)] == []
    assert not any((janitor.SHARED_MEMORY / name).exists() for name in memory)
    with pytest.raises(ProcessDied, match="was stopped"):
        process.call("echo", deadline_s=5)


def test_stop_finds_shared_memory_of_descendants_that_died_before(launcher: LocalLauncher):
    process = launcher.start("leaky", "suite.selftest.targets:Leaky")
    name = process.ready(20)["name"]
    process.call("end_owner", deadline_s=10)
    assert (janitor.SHARED_MEMORY / name).exists()
    process.stop(grace_s=0)
    assert not (janitor.SHARED_MEMORY / name).exists()


@pytest.mark.parametrize("dies", [False, True], ids=["stopped", "killed"])
def test_stop_finds_shared_memory_that_is_named_after_processes_that_were_killed(
    launcher: LocalLauncher, dies: bool, request
):
    """The CUDA driver's stayed after trainers and workers that were killed on an H200."""
    process = launcher.start("leaky", "suite.selftest.targets:Leaky")
    process.ready(20)
    stranger = janitor.SHARED_MEMORY / f"cuda.shm.0.{os.getpid():x}.1"
    stranger.touch()
    request.addfinalizer(stranger.unlink)
    names = process.call("name_memory_after", deadline_s=10)
    process.call("end_owner", deadline_s=10)
    if dies:
        with pytest.raises(ProcessDied):
            process.call("die", deadline_s=10)
    process.stop(grace_s=0)
    assert [name for name in names if (janitor.SHARED_MEMORY / name).exists()] == []
    assert stranger.exists()


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("torch_12_34_5", 12), ("cuda.shm.0.1234.1", 0x1234), ("cuda.shm.3e8.ff.a", 255), ("torch_12", None),
        ("cuda.shm.0.12", None), ("cuda.shm.0.12.1.bak", None), ("cuda.shm.0.xyz.1", None), ("psm_03456c7c", None),
    ],
)  # fmt: skip
def test_shared_memory_says_whose_it_is(name: str, owner: int | None):
    assert janitor.owner_of(name) == owner


def test_who_stops_a_process_that_another_thread_stops_waits_for_the_end_of_it(launcher: LocalLauncher, monkeypatch):
    """Or a run would end, and pytest with it, before what the process left is removed."""
    process, removed = start(launcher), threading.Event()

    def slow(*arguments: object) -> None:
        time.sleep(1)
        janitor_end(*arguments)
        removed.set()

    janitor_end = janitor.end_process
    monkeypatch.setattr(janitor, "end_process", slow)
    threading.Thread(target=process.stop, daemon=True).start()
    time.sleep(0.2)
    launcher.close()
    assert removed.is_set()


def test_stop_leaves_shared_memory_that_others_use(launcher: LocalLauncher):
    owner, user = start(launcher, "owner"), start(launcher, "user")
    name = owner.call("shared_memory", deadline_s=10)
    user.call("attach", name, deadline_s=10)
    user.stop(grace_s=0)
    assert (janitor.SHARED_MEMORY / name).exists()
    owner.stop(grace_s=0)
    assert not (janitor.SHARED_MEMORY / name).exists()


@pytest.mark.parametrize("hold_interpreter", [False, True])
def test_stop_ends_a_process_stuck_in_native_code(launcher: LocalLauncher, hold_interpreter: bool):
    process = start(launcher)
    process.submit("sleep_in_native_code", 600, hold_interpreter)
    time.sleep(0.3)
    started = time.monotonic()
    process.stop(grace_s=0.2)
    assert not running(process.pid)
    assert time.monotonic() - started < 5


def test_close_ends_everything_and_removes_the_directory(tmp_path: Path):
    launcher = LocalLauncher(tmp_path / "logs")
    processes_ = [start(launcher, "same name"), start(launcher, "same name")]
    pids = [pid for process in processes_ for pid in [process.pid, *process.call("grandchildren", deadline_s=10)]]
    assert launcher.directory.exists()
    launcher.close(grace_s=0.5)
    assert [pid for pid in pids if running(pid)] == []
    assert not launcher.directory.exists()
    assert sorted(path.name for path in launcher.logs.iterdir()) == ["same_name.2.log", "same_name.log"]
    launcher.close()


def test_close_does_the_janitors_work_when_that_is_gone(tmp_path: Path):
    launcher = LocalLauncher(tmp_path / "logs")
    launcher.janitor.kill()
    launcher.janitor.wait(5)
    process = start(launcher)
    launcher.close(grace_s=0)
    assert not running(process.pid)
    assert not launcher.directory.exists()


def test_processes_outlive_the_thread_that_launched_them(launcher: LocalLauncher):
    found: list[Process] = []
    thread = threading.Thread(target=lambda: found.append(start(launcher)))
    thread.start()
    thread.join(20)
    time.sleep(0.2)
    assert found[0].call("echo", 1, deadline_s=5) == [[1], {}]


def test_a_full_disk_loses_output_and_nothing_else(launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_open_log", lambda path: os.open("/dev/full", os.O_WRONLY))
    process = start(launcher)
    process.call("say", "lost", deadline_s=5)
    with pytest.raises(RemoteError, match="bad"):
        process.call("fail", "bad", deadline_s=5)
    assert process.call("echo", 1, deadline_s=5) == [[1], {}]


def test_a_log_that_cannot_be_created_is_no_reason_to_fail(launcher: LocalLauncher):
    (launcher.logs / "worker.log").mkdir()
    process = start(launcher)
    assert process.call("echo", 1, deadline_s=5) == [[1], {}]
    assert "cannot be read" in process.tail()


HOST = """
import json, sys, time
from pathlib import Path
from suite.processes.local import LocalLauncher

launcher = LocalLauncher(Path(sys.argv[1]))
stuck, busy = (launcher.start(name, "suite.selftest.targets:Echo") for name in ("stuck", "busy"))
waiting = launcher.ahead("waiting", "suite.selftest.targets:Ahead")
waiting.imported.result(20)
pids = [stuck.pid, busy.pid, waiting.pid, launcher.janitor.pid, *busy.call("grandchildren", True, deadline_s=20)]
memory = [busy.call(kind, deadline_s=20) for kind in ("shared_memory", "semaphore")]
memory += [*busy.call("torch_shared_memory", deadline_s=60)]
stuck.submit("sleep_in_native_code", 600, True)
print(json.dumps({"pids": pids, "memory": memory, "directory": str(launcher.directory)}), flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_pytest_is_killed(tmp_path: Path):
    pytest.importorskip("torch", reason="torch's shared memory is part of what has to be gone")
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path / "logs")], stdout=subprocess.PIPE, cwd=ROOT)
    found = json.loads(host.stdout.readline())
    assert len(found["memory"]) >= 3
    assert all(running(pid) for pid in found["pids"])
    assert all((janitor.SHARED_MEMORY / name).exists() for name in found["memory"])
    host.kill()
    host.wait(5)
    wait_until_gone(found["pids"], found["memory"], Path(found["directory"]))


LONELY = """
import sys, time
from pathlib import Path
from suite.processes.local import LocalLauncher

launcher = LocalLauncher(Path(sys.argv[1]))
launcher.janitor.kill()
process = launcher.start("lonely", "suite.selftest.targets:Echo")
process.ready(20)
process.submit("sleep_in_native_code", 600, False)
waiting = launcher.ahead("waiting", "suite.selftest.targets:Ahead")
waiting.imported.result(20)
print(process.pid, waiting.pid, launcher.directory, flush=True)
time.sleep(600)
"""


def test_processes_end_without_a_janitor_too(tmp_path: Path):
    command = [sys.executable, "-c", LONELY, str(tmp_path)]
    host = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    *pids, directory = host.stdout.readline().split()
    host.kill()
    host.wait(5)
    shutil.rmtree(directory)
    wait_until_gone([*map(int, pids)], [], Path(directory))


ANSWERING = """
import os, signal, sys, time
from pathlib import Path
from suite.processes.local import LocalLauncher

launcher = LocalLauncher(Path(sys.argv[1]))
process = launcher.start("answering", "suite.selftest.targets:Echo")
process.ready(20)
process.submit("sleep", 0.5)
os.kill(launcher.janitor.pid, signal.SIGSTOP)
print(process.pid, launcher.janitor.pid, launcher.directory, flush=True)
time.sleep(600)
"""


def test_an_answer_that_nobody_takes_ends_no_process_before_the_janitor_has_seen_it(tmp_path: Path):
    command = [sys.executable, "-c", ANSWERING, str(tmp_path)]
    host = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    pid, of_the_janitor, directory = host.stdout.readline().split()
    host.kill()
    host.wait(5)
    try:
        time.sleep(2)
        assert running(int(pid)), "expected a process to be there as long as the janitor may need to see what it holds"
    finally:
        os.kill(int(of_the_janitor), signal.SIGCONT)
    wait_until_gone([int(pid), int(of_the_janitor)], [], Path(directory))


STUCK = """
import sys
import threading
from pathlib import Path
from suite.processes import janitor
from suite.processes.local import LocalLauncher

class Stuck:
    pid = 0

    def stop(self, grace_s):
        threading.Event().wait()

janitor.END_DEADLINE_S = 0.1
launcher = LocalLauncher(Path(sys.argv[1]))
launcher.processes.append(Stuck())
launcher.close(0.1)
print("closed")
"""


def test_what_can_not_be_stopped_keeps_nobody_from_ending(tmp_path: Path):
    command = [sys.executable, "-c", STUCK, str(tmp_path / "logs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "closed\n", done.stderr


def test_nothing_is_started_once_the_launcher_is_closed(tmp_path: Path):
    launcher = LocalLauncher(tmp_path / "logs")
    launcher.close(grace_s=0)
    with pytest.raises(RuntimeError, match="late is not started: this launcher was closed"):
        launcher.start("late", ECHO)
    assert launcher.processes == []


def test_what_is_being_started_while_the_launcher_closes_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    launcher, begun, plain = LocalLauncher(tmp_path / "logs"), threading.Event(), local.LocalProcess.start

    def slow(self: Process, *arguments: object) -> None:
        begun.set()
        time.sleep(0.5)
        plain(self, *arguments)

    monkeypatch.setattr(local.LocalProcess, "start", slow)
    starting = threading.Thread(target=launcher.start, args=("late", ECHO))
    starting.start()
    assert begun.wait(10)
    launcher.close(grace_s=0)
    starting.join(10)
    assert [running(process.pid) for process in launcher.processes] == [False]
