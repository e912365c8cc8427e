"""A group of two ranks over NCCL: it comes up, or fails in time on both, and what blocks can be ended.

With two GPUs each rank has one. With one GPU both share it: NCCL takes them for two hosts, which talk over sockets.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from extensions.group import LINGER_S
from suite.processes.call import Call, Process, ProcessDied, RemoteError, gather
from suite.processes.local import LocalLauncher, free_port

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEADLINE_S = 60
JOIN_S = 4.0
SLACK_S = 7.0  # an abort of NCCL may take 5 s
UNTAKEN_BYTES = 1 << 28  # less can end without anyone who takes it, in the buffers of the other GPU
DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int64")
NCCL_STEPS = ("NCCL", "split", "first broadcast")  # where the others wait inside NCCL; the CPU tests have all others
KILLED = [(step, victim) for step in NCCL_STEPS for victim in (0, 1)] + [("broadcast", 0)]


@contextlib.contextmanager
def started(directory: Path, *ranks: int) -> Iterator[list[Process]]:
    """A process for each of these ranks, with all that it needs to join; all of them start at once."""
    apart = torch.cuda.device_count() < 2
    with LocalLauncher(directory / "logs") as launcher:
        processes = []
        for number, rank in enumerate(ranks):
            env = {"NCCL_HOSTID": f"host{rank}", "NCCL_NET": "Socket"} if apart else {}
            processes.append(launcher.start(f"process{number}-rank{rank}", "suite.selftest.ranks:Rank", env=env))
        for process in processes:
            process.ready(60)
        gather([process.submit("prepare", device(rank)) for process, rank in zip(processes, ranks, strict=True)], 120)
        yield processes


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    with started(tmp_path_factory.mktemp("gpu"), 0, 1, *(victim for _, victim in KILLED)) as processes:
        yield processes


@pytest.fixture
def ranks(everyone: list[Process]) -> list[Process]:
    """The two that every test leaves as they were."""
    return everyone[:2]


@pytest.fixture
def dying(everyone: list[Process], step: str, victim: int) -> Process:
    """One that is there for a single test, which kills it."""
    return everyone[2 + KILLED.index((step, victim))]


def device(rank: int) -> str:
    return f"cuda:{rank if torch.cuda.device_count() > 1 else 0}"


def joining(pair: list[Process], culprit: int = 0, slip: tuple[str, str, float] | None = None, **how) -> list[Call]:
    """Have two processes join one group, one of which slips; rank 0's call, then rank 1's."""
    port = free_port()
    how = {"join_timeout_s": 60, "timeout_s": 30} | how
    return [
        process.submit("join", rank, 2, port, device=device(rank), slip=slip if rank == culprit else None, **how)
        for rank, process in enumerate(pair)
    ]


def failure(call: Call) -> tuple[str, str, float]:
    """The type of an error, what it says, and the seconds after which it came."""
    with pytest.raises(RemoteError) as caught:
        call.result(DEADLINE_S)
    return caught.value.kind, caught.value.message, float(re.search(r"\(after ([0-9.]+) s\)", caught.value.message)[1])


def expect_works(pair: list[Process]) -> None:
    """Whether both, together, have every tensor bit by bit; both leave then."""
    for dtype in DTYPES:
        arrived = gather([rank.submit("broadcast", dtype) for rank in pair], DEADLINE_S)
        assert all(map(all, arrived)), f"{dtype}: expected every shape on both ranks, found {arrived}"
    gather([rank.submit("close") for rank in pair], DEADLINE_S)


def expect_usable(ranks: list[Process]) -> None:
    gather(joining(ranks), DEADLINE_S)
    expect_works(ranks)


def test_a_group_comes_up_and_again(ranks: list[Process]):
    expect_usable(ranks)
    expect_usable(ranks)


@pytest.mark.parametrize(("step", "culprit"), [*((step, 1) for step in NCCL_STEPS), ("NCCL", 0)])
def test_a_slow_rank_is_found_in_time_and_a_new_group_comes_up(ranks: list[Process], step: str, culprit: int):
    calls = joining(ranks, culprit, (step, "slow", JOIN_S + 1), join_timeout_s=JOIN_S)
    kind, message, after_s = failure(calls.pop(1 - culprit))
    assert kind == "TimeoutError"
    assert f"within {JOIN_S:g} s" in message
    assert after_s < JOIN_S + LINGER_S + SLACK_S
    failure(calls[0])
    expect_usable(ranks)


@pytest.mark.parametrize("step", NCCL_STEPS)
def test_a_slow_join_succeeds_however_short_a_transfer_may_take(ranks: list[Process], step: str):
    gather(joining(ranks, 1, (step, "slow", 1.5), timeout_s=0.5), DEADLINE_S)
    expect_works(ranks)


@pytest.mark.parametrize(("step", "victim"), KILLED[:-1])
def test_a_rank_that_dies_in_the_join_leaves_the_other_usable(
    ranks: list[Process], dying: Process, step: str, victim: int
):
    pair = [dying, ranks[1]] if victim == 0 else [ranks[0], dying]
    calls = joining(pair, victim, (step, "killed", 0), join_timeout_s=JOIN_S)
    with pytest.raises(ProcessDied):
        calls[victim].result(DEADLINE_S)
    kind, _, after_s = failure(calls[1 - victim])
    assert kind in ("TimeoutError", "GroupError")
    assert after_s < JOIN_S + LINGER_S + SLACK_S
    expect_usable(ranks)


@pytest.mark.parametrize(("step", "victim"), KILLED[-1:])
def test_a_trainer_that_dies_in_a_broadcast_ends_it(ranks: list[Process], dying: Process, step: str, victim: int):
    gather(joining([dying, ranks[1]], timeout_s=60), DEADLINE_S)
    receiving = ranks[1].submit("broadcast_failing")
    time.sleep(1)
    assert not receiving.done()
    dying.stop(0)
    began_s = time.monotonic()
    assert receiving.result(DEADLINE_S) != "no error"
    assert time.monotonic() - began_s < 10
    expect_usable(ranks)


def test_a_broadcast_that_nobody_takes_is_given_up_in_time(ranks: list[Process]):
    gather(joining(ranks, timeout_s=2), DEADLINE_S)
    began_s = time.monotonic()
    said = ranks[0].call("broadcast_failing", UNTAKEN_BYTES, deadline_s=DEADLINE_S)
    assert "within 2 s; the group was aborted" in said
    assert 2 <= time.monotonic() - began_s < 2 + SLACK_S
    gather([rank.submit("close") for rank in ranks], DEADLINE_S)
    expect_usable(ranks)


def test_an_abort_from_another_thread_ends_a_blocked_send(ranks: list[Process]):
    gather(joining(ranks, timeout_s=60), DEADLINE_S)
    said, after_s = ranks[0].call("broadcast_aborted", 1.0, UNTAKEN_BYTES, deadline_s=DEADLINE_S)
    assert "rank 0: the test says so; the group was aborted, make a new one" in said, "or the send was not blocked"
    assert 0 < after_s < 2, "expected the send to end after the abort, not before"
    gather([rank.submit("close") for rank in ranks], DEADLINE_S)
    expect_usable(ranks)


def test_a_broadcast_takes_about_as_long_as_vllms_own(ranks: list[Process]):
    """A communicator whose calls do not block takes seven times as long for 1 MiB."""
    gather(joining(ranks), DEADLINE_S)
    port = free_port()
    calls = [rank.submit("compare_with_vllm", index, port, 1 << 20, 400) for index, rank in enumerate(ranks)]
    for found in gather(calls, DEADLINE_S):
        if found is None:
            pytest.skip("vLLM has no PyNcclCommunicator that works here")
        ours_s, theirs_s = found
        assert ours_s < 3 * theirs_s, f"400 broadcasts of 1 MiB: expected less than 3 x {theirs_s} s, found {ours_s} s"
    gather([rank.submit("close") for rank in ranks], DEADLINE_S)
