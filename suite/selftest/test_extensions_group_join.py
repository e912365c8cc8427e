"""A rank that is slow, fails or dies at any step of the join: the others raise in time, and say which and why."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from extensions.group import LINGER_S, GroupError, stateless_init_process_group
from suite.processes.call import Call, Process, ProcessDied, RemoteError, gather
from suite.processes.local import LocalLauncher, free_port
from suite.selftest.ranks import STEPS, started

DEADLINE_S = 30
SLACK_S = 1.5  # for a machine that is busy with other things
JOIN_S = 1.0
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    with started(tmp_path_factory.mktemp("join"), 3) as processes:
        yield processes


def joining(ranks: list[Process], culprit: int, slip: tuple[str, str, float], **how: object) -> list[Call]:
    """Have all processes join one group, one of which slips; the others' calls, then the culprit's."""
    port = free_port()
    calls = [
        process.submit("join", rank, len(ranks), port, slip=slip if rank == culprit else None, **how)
        for rank, process in enumerate(ranks)
    ]
    return [*calls[:culprit], *calls[culprit + 1 :], calls[culprit]]


def failure(call: Call) -> tuple[str, str, float]:
    """The type of an error, what it says, and the seconds after which it came."""
    with pytest.raises(RemoteError) as caught:
        call.result(DEADLINE_S)
    return caught.value.kind, caught.value.message, float(re.search(r"\(after ([0-9.]+) s\)", caught.value.message)[1])


def works(ranks: list[Process]) -> bool:
    return all(map(all, gather([rank.submit("broadcast", "float32") for rank in ranks], DEADLINE_S)))


# ---- slow


@pytest.mark.parametrize(
    ("step", "culprit"), [*((step, 2) for step in STEPS), ("arrived", 0), ("begun to connect", 0), ("finished", 0)]
)
def test_a_slow_rank_is_named_on_all_others_in_time(ranks: list[Process], step: str, culprit: int):
    *others, late = joining(ranks, culprit, (step, "slow", JOIN_S + 1), join_timeout_s=JOIN_S)
    for kind, message, after_s in map(failure, others):
        assert kind == "TimeoutError"
        named = "nothing listens there" if (step, culprit) == ("arrived", 0) else f"ranks [{culprit}] have not "
        assert named in message
        assert "within 1 s" in message
        assert JOIN_S - 0.1 < after_s < JOIN_S + LINGER_S + SLACK_S
    failure(late)


@pytest.mark.parametrize("step", STEPS)
def test_a_slow_join_succeeds_however_short_a_transfer_may_take(ranks: list[Process], step: str):
    calls = joining(ranks, 2, (step, "slow", 1.0), join_timeout_s=20, timeout_s=0.5)
    assert max(gather(calls, DEADLINE_S)) > 0.9
    assert works(ranks)
    began_s = time.monotonic()
    assert "a broadcast has not ended within 0.5 s" in ranks[0].call("broadcast_failing", deadline_s=DEADLINE_S)
    assert time.monotonic() - began_s < 0.5 + SLACK_S


# ---- failing


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("step", STEPS[1:])
def test_what_a_rank_raises_is_raised_on_all_at_once(ranks: list[Process], step: str, culprit: int):
    for kind, message, after_s in map(failure, joining(ranks, culprit, (step, "raises", 0), join_timeout_s=20)):
        assert kind == "GroupError"
        assert f"rank {culprit} could not make the group: on purpose" in message
        assert after_s < LINGER_S + SLACK_S


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_rank_is_found_by_the_deadline(ranks: list[Process], tmp_path: Path, step: str):
    with LocalLauncher(tmp_path / "logs") as launcher:
        victim = launcher.start("victim", "suite.selftest.ranks:Rank")
        victim.ready(60)
        *others, died = joining([*ranks[:2], victim], 2, (step, "killed", 0), join_timeout_s=JOIN_S)
        for kind, message, after_s in map(failure, others):
            assert kind in ("TimeoutError", "GroupError")
            assert "ranks [2] have not" in message or "Connection closed by peer" in message
            assert after_s < JOIN_S + LINGER_S + SLACK_S
        with pytest.raises(ProcessDied):
            died.result(DEADLINE_S)
    gather(joining(ranks, 0, ("", "", 0)), DEADLINE_S)
    assert works(ranks)


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_killed_trainer_is_found_at_once(ranks: list[Process], tmp_path: Path, step: str):
    with LocalLauncher(tmp_path / "logs") as launcher:
        victim = launcher.start("victim", "suite.selftest.ranks:Rank")
        victim.ready(60)
        *others, _ = joining([victim, *ranks[1:]], 0, (step, "killed", 0), join_timeout_s=20)
        for kind, message, after_s in map(failure, others):
            assert kind == "GroupError"
            assert re.search(r"rank 0.* is gone|Connection closed by peer|the trainer's \(rank 0's\) own", message)
            assert after_s < 5 + SLACK_S


# ---- abort


def test_an_abort_ends_a_blocked_send_and_the_receiver_notices(ranks: list[Process]):
    gather(joining(ranks, 0, ("", "", 0), timeout_s=60), DEADLINE_S)
    before = [rank.call("threads", deadline_s=DEADLINE_S) for rank in ranks]
    said, after_s = ranks[0].call("broadcast_aborted", 0.5, deadline_s=DEADLINE_S)
    assert "the test says so; make a new group" in said
    assert after_s < 2
    began_s = time.monotonic()
    for rank in ranks[1:]:
        assert "Connection closed by peer" in rank.call("broadcast_failing", deadline_s=DEADLINE_S)
    assert time.monotonic() - began_s < 2
    assert "the test says so" in ranks[0].call("broadcast_failing", deadline_s=DEADLINE_S), "it stays given up"
    gather([rank.submit("close") for rank in ranks], DEADLINE_S)
    after = [rank.call("threads", deadline_s=DEADLINE_S) for rank in ranks]
    assert all(now <= then for now, then in zip(after, before, strict=True)), f"threads: {before}, then {after}"
    gather(joining(ranks, 0, ("", "", 0)), DEADLINE_S)
    assert works(ranks)


def test_an_abort_leaves_another_group_of_the_same_processes_alone(ranks: list[Process]):
    gather(joining(ranks[:2], 0, ("", "", 0), timeout_s=60), DEADLINE_S)
    gather([rank.submit("swap_groups") for rank in ranks[:2]], DEADLINE_S)
    gather(joining(ranks[:2], 0, ("", "", 0), timeout_s=60), DEADLINE_S)
    ranks[0].call("broadcast_aborted", 0.2, deadline_s=DEADLINE_S)
    gather([rank.submit("swap_groups") for rank in ranks[:2]], DEADLINE_S)
    assert works(ranks[:2]), "the group that was not aborted"
    gather([rank.submit("swap_groups") for rank in ranks[:2]], DEADLINE_S)
    gather([rank.submit("close") for rank in ranks[:2]], DEADLINE_S)


# ---- where rank 0 listens


def addresses() -> list[str]:
    """Those of this machine, and a second one that every Linux has."""
    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    return [address for address in ["127.0.0.2", *found] if address != LOOPBACK]


def test_rank_0_and_gloo_listen_at_the_given_address_alone(ranks: list[Process]):
    port = free_port()
    first = ranks[0].submit("join", 0, 2, port)
    deadline = time.monotonic() + DEADLINE_S
    while port not in {at.port for at in listening(ranks[0])}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for address in addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=1)
    gather([first, ranks[1].submit("join", 1, 2, port)], DEADLINE_S)
    ends = [at for rank in ranks[:2] for at in listening(rank)]
    assert {at.ip for at in ends} == {LOOPBACK}
    assert works(ranks[:2])


@pytest.mark.parametrize("address", ["localhost", "0.0.0.0", *addresses()[1:]])
def test_a_group_comes_up_at_every_address_of_its_host(ranks: list[Process], address: str):
    port = free_port()
    gather([rank.submit("join", index, 2, port, address=address) for index, rank in enumerate(ranks[:2])], DEADLINE_S)
    assert works(ranks[:2])
    gather([rank.submit("close") for rank in ranks[:2]], DEADLINE_S)


def listening(process: Process) -> list:
    found = psutil.Process(process.pid).net_connections(kind="tcp")
    return [one.laddr for one in found if one.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("203.0.113.7", "203.0.113.7 is no address of this host, and rank 0 listens at its own; give all ranks one"),
        ("no.such.host.invalid", "'no.such.host.invalid' is no address and no host's name"),
    ],
)
def test_an_address_of_another_host_is_named(address: str, said: str):
    with pytest.raises(GroupError, match=re.escape(said)):
        stateless_init_process_group(address, free_port(), 0, 2, "cpu", join_timeout_s=5)


@pytest.mark.parametrize("variable", ["WEIGHT_UPDATE_TIMEOUT_S", "WEIGHT_UPDATE_JOIN_TIMEOUT_S"])
def test_a_timeout_that_is_no_number_of_seconds_is_named(monkeypatch: pytest.MonkeyPatch, variable: str):
    for text in ("soon", "0", "-1", "inf"):
        monkeypatch.setenv(variable, text)
        with pytest.raises(ValueError, match=f"{variable}: expected seconds, found '{text}'"):
            stateless_init_process_group(LOOPBACK, free_port(), 0, 2, "cpu")


def test_the_environment_says_how_long_a_join_may_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHT_UPDATE_JOIN_TIMEOUT_S", "0.3")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] have not joined within 0\.3 s; slow ones get longer"):
        stateless_init_process_group(LOOPBACK, free_port(), 0, 2, "cpu", timeout_s=60)
