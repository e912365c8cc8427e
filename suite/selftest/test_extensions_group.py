"""stateless_init_process_group over gloo: it carries every tensor, or fails in time, on every rank."""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest
import torch

from extensions.group import LINGER_S, GroupError, gloo, stateless_init_process_group
from suite.processes.call import Call, Process, RemoteError, gather
from suite.processes.local import LocalLauncher, free_port
from suite.selftest.ranks import started

DEADLINE_S = 30
SLACK_S = 1.5  # for a machine that is busy with other things
DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32",
    "complex64", "complex128",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """Three processes, which every test lets join a group of its own."""
    with started(tmp_path_factory.mktemp("group"), 3) as processes:
        yield processes


def joining(ranks: list[Process], *joins: tuple[int, int], **how: object) -> list[Call]:
    """Have the processes join as (rank, world size), at a port that is free."""
    port = free_port()
    return [process.submit("join", *join, port, **how) for process, join in zip(ranks, joins, strict=False)]


def failures(calls: list[Call]) -> list[RemoteError]:
    found = []
    for call in calls:
        with pytest.raises(RemoteError) as caught:
            call.result(DEADLINE_S)
        found.append(caught.value)
    return found


def seconds(error: RemoteError) -> float:
    return float(re.search(r"\(after ([0-9.]+) s\)", error.message)[1])


# ---- what arrives


@pytest.mark.parametrize("src", [0, 2])
def test_tensors_of_every_dtype_arrive_bit_by_bit(ranks: list[Process], src: int):
    gather(joining(ranks, (0, 3), (1, 3), (2, 3)), DEADLINE_S)
    for dtype in DTYPES:
        arrived = gather([rank.submit("broadcast", dtype, src) for rank in ranks], DEADLINE_S)
        assert all(all(one) for one in arrived), f"{dtype}: expected every shape on every rank, found {arrived}"


def test_a_group_leaves_torchs_global_one_alone(ranks: list[Process]):
    pair = ranks[:2]
    assert not any(gather([rank.submit("default_group") for rank in pair], DEADLINE_S))
    gather(joining(pair, (0, 2), (1, 2)), DEADLINE_S)
    assert not any(gather([rank.submit("default_group") for rank in pair], DEADLINE_S))


def test_a_group_works_beside_torchs_global_one(ranks: list[Process]):
    pair, port = ranks[:2], free_port()
    gather([rank.submit("open_default_group", index, 2, port) for index, rank in enumerate(pair)], DEADLINE_S)
    try:
        gather(joining(pair, (1, 2), (0, 2)), DEADLINE_S)  # other ranks than there
        assert all(map(all, gather([rank.submit("broadcast", "float32") for rank in pair], DEADLINE_S)))
        gather([rank.submit("close") for rank in pair], DEADLINE_S)
        assert gather([rank.submit("sum_over_default_group") for rank in pair], DEADLINE_S) == [2, 2]
    finally:
        gather([rank.submit("close_default_group") for rank in pair], DEADLINE_S)


def test_the_port_of_a_closed_group_is_free_again(ranks: list[Process]):
    port = free_port()
    for _ in range(3):
        gather([rank.submit("join", index, 2, port) for index, rank in enumerate(ranks[:2])], DEADLINE_S)
        gather([rank.submit("close") for rank in ranks[:2]], DEADLINE_S)


def test_the_port_of_a_refused_group_is_free_again(ranks: list[Process]):
    port = free_port()
    failures([rank.submit("join", index, 2 + index, port) for index, rank in enumerate(ranks[:2])])
    gather([rank.submit("join", index, 2, port) for index, rank in enumerate(ranks[:2])], DEADLINE_S)


# ---- what does not come up


@pytest.mark.parametrize("joins", [[(0, 3), (1, 3), (2, 4)], [(0, 2), (1, 3), (2, 3)], [(0, 3), (1, 4), (2, 3)]])
def test_a_wrong_world_size_is_named_on_every_rank(ranks: list[Process], joins: list[tuple[int, int]]):
    for error in failures(joining(ranks, *joins)):
        assert error.kind == "GroupError"
        assert re.search(r"rank \d has world_size=\d device=cpu, rank \d has world_size=\d device=cpu", error.message)
        assert seconds(error) < LINGER_S + SLACK_S


def test_a_rank_that_is_taken_is_named_on_every_rank(ranks: list[Process]):
    for error in failures(joining(ranks, (0, 3), (1, 3), (1, 3))):
        assert error.kind == "GroupError"
        assert "rank 1 is taken; do two engines have the same rank_offset?" in error.message
        assert seconds(error) < LINGER_S + SLACK_S


def test_a_missing_rank_is_named_in_time_on_every_rank_that_is_there(ranks: list[Process]):
    for error in failures(joining(ranks, (0, 3), (1, 3), join_timeout_s=2)):
        assert error.kind == "TimeoutError"
        assert "ranks [2] have not joined within 2 s" in error.message
        assert 1.9 < seconds(error) < 2 + SLACK_S


def test_a_missing_trainer_is_named_in_time(ranks: list[Process]):
    (error,) = failures(joining(ranks, (1, 2), join_timeout_s=2))
    assert error.kind == "TimeoutError"
    assert "nothing listens there within 2 s; is the trainer (rank 0) up" in error.message
    assert 1.9 < seconds(error) < 2 + SLACK_S


def test_a_port_that_is_taken_is_named(ranks: list[Process]):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        trainer, worker = failures([ranks[0].submit("join", 0, 2, port, 2), ranks[1].submit("join", 1, 2, port, 2)])
    assert trainer.kind == worker.kind == "GroupError"
    assert "is the port taken?" in trainer.message
    assert "what listens there does not answer as rank 0 would" in worker.message
    assert seconds(worker) < 2 + SLACK_S


def test_a_communicator_that_does_nothing_is_refused_on_every_rank(ranks: list[Process]):
    """The sender has the right value whatever its communicator does: only the others can tell it."""
    for error in failures(joining(ranks, (0, 2), (1, 2), fake="silent")):
        assert error.kind == "GroupError"
        assert re.search(r"rank \d has \d+ after the first broadcast, rank \d has \d+ after the first", error.message)
        assert seconds(error) < LINGER_S + SLACK_S


def test_a_backend_that_fails_on_one_rank_is_named_on_all(ranks: list[Process]):
    port = free_port()
    fakes = ["failing", "silent", "silent"]
    errors = failures([rank.submit("join", index, 3, port, 5, fakes[index]) for index, rank in enumerate(ranks)])
    for error in errors:
        assert error.kind == "GroupError"
        assert "rank 0 could not make the group: no such wire (after" in error.message
        assert seconds(error) < LINGER_S + SLACK_S


@pytest.mark.parametrize(
    ("rank", "world_size", "said"),
    [
        (0, 1, "at least 2 ranks, found world_size=1"),
        (2, 2, r"rank 2 is outside 0\.\.1"),
        (-1, 2, "rank -1 is outside"),
    ],
)
def test_impossible_ranks_are_refused_at_once(rank: int, world_size: int, said: str):
    with pytest.raises(ValueError, match=said):
        stateless_init_process_group("127.0.0.1", free_port(), rank, world_size, "cpu")


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_impossible_ports_are_refused_at_once(port: int):
    with pytest.raises(ValueError, match=rf"expected a port of 1\.\.65535 that rank 0 listens at, found {port}"):
        stateless_init_process_group("127.0.0.1", port, 1, 2, "cpu", join_timeout_s=0.1)


@pytest.mark.parametrize("name", ["timeout_s", "join_timeout_s"])
@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_impossible_timeouts_are_refused_at_once(name: str, seconds: float):
    given = {"join_timeout_s": 0.1, name: seconds}
    with pytest.raises(ValueError, match=rf"^{name}: expected seconds, more than 0 and finite, found"):
        stateless_init_process_group("127.0.0.1", free_port(), 1, 2, "cpu", **given)


# ---- misuse


@pytest.mark.parametrize("src", [-1, 2])
def test_a_source_that_is_no_rank_is_refused(src: int):
    """On the one rank alone: nobody is kept waiting."""
    port = free_port()
    with futures.ThreadPoolExecutor(2) as pool:
        joined = [pool.submit(stateless_init_process_group, "127.0.0.1", port, rank, 2, "cpu") for rank in (0, 1)]
        groups = [one.result(DEADLINE_S) for one in joined]
    with pytest.raises(ValueError, match=rf"expected src to be a rank of 0\.\.1, found {src}"):
        groups[0].broadcast(torch.zeros(1), src)
    for group in groups:
        group.close()


def test_the_port_is_free_again_while_the_error_of_a_failed_join_is_kept(monkeypatch: pytest.MonkeyPatch):
    """The error's traceback keeps every frame alive, and the communicator that was being made."""
    plain = gloo._device

    def fail(address: str) -> object:
        if threading.current_thread() is threading.main_thread():  # rank 0, which listens
            raise OSError("no device")
        return plain(address)

    monkeypatch.setattr(gloo, "_device", fail)
    port = free_port()
    with futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(stateless_init_process_group, "127.0.0.1", port, 1, 2, "cpu")
        with pytest.raises(GroupError, match="rank 0 could not make the group: no device") as kept:
            stateless_init_process_group("127.0.0.1", port, 0, 2, "cpu")
        assert isinstance(other.exception(DEADLINE_S), GroupError)
    assert kept.value.__traceback__ is not None
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED, "expected nothing to listen any more"


@pytest.mark.parametrize(
    ("what", "said"), [("strided", "only contiguous tensors"), ("elsewhere", "is on cpu, the tensor on meta")]
)
def test_what_cannot_be_sent_in_place_is_refused(ranks: list[Process], what: str, said: str):
    gather(joining(ranks[:2], (0, 2), (1, 2)), DEADLINE_S)
    with pytest.raises(RemoteError, match=said) as caught:
        ranks[0].call("broadcast_wrong", what, deadline_s=DEADLINE_S)
    assert caught.value.kind == "ValueError"
    assert all(map(all, gather([rank.submit("broadcast", "float32") for rank in ranks[:2]], DEADLINE_S)))


def test_a_closed_communicator_says_so(ranks: list[Process]):
    gather(joining(ranks[:2], (0, 2), (1, 2)), DEADLINE_S)
    with pytest.raises(RemoteError, match="this communicator is closed") as caught:
        ranks[0].call("close_and_broadcast", deadline_s=DEADLINE_S)
    assert caught.value.kind == GroupError.__name__


def test_a_rank_that_died_fails_the_broadcast_of_the_others(ranks: list[Process], tmp_path: Path):
    with LocalLauncher(tmp_path / "logs") as launcher:
        pair = [ranks[0], launcher.start("dying", "suite.selftest.ranks:Rank")]
        pair[1].ready(60)
        gather(joining(pair, (0, 2), (1, 2)), DEADLINE_S)
        pair[1].stop()
        with pytest.raises(RemoteError):
            pair[0].call("broadcast", "float32", 1, deadline_s=DEADLINE_S)


def test_a_broadcast_that_nobody_receives_fails_in_time(ranks: list[Process]):
    gather(joining(ranks[:2], (0, 2), (1, 2), timeout_s=2), DEADLINE_S)
    started = time.monotonic()
    with pytest.raises(RemoteError, match="a broadcast has not ended within 2 s; make a new group"):
        ranks[0].call("broadcast", "float32", deadline_s=DEADLINE_S)
    assert time.monotonic() - started < 2 + SLACK_S


def test_a_group_leaves_no_descriptor_behind():
    """Both ranks in this process, one group after the other."""
    counts = []
    for _ in range(3):
        port = free_port()
        with futures.ThreadPoolExecutor(2) as pool:
            joined = [pool.submit(stateless_init_process_group, "127.0.0.1", port, rank, 2, "cpu") for rank in (0, 1)]
            for group in [one.result(DEADLINE_S) for one in joined]:
                group.close()
        counts.append(len(os.listdir("/dev/fd")))
    assert counts[-1] - counts[0] < 4, f"expected as many descriptors after every group, found {counts}"
