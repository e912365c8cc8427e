"""The watcher that ends NCCL's waits, with a device, a clock and a communicator that do as they are told."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from extensions.group import GroupError, nccl
from extensions.group.nccl import NcclCommunicator
from extensions.group.nccl_binding import NcclError

SOON_S = 5.0


class Event:
    """A CUDA event that has happened when the device says so."""

    def __init__(self, device: "Device") -> None:
        self._device = device

    def record(self, stream: object) -> None:
        self._number = next(self._device.numbers)

    def synchronize(self) -> None:
        if self._device.broken:
            raise RuntimeError("CUDA error: operation not permitted")
        while not self._device.idle.is_set() and self._number >= self._device.ended:
            time.sleep(0.01)


class Device:
    """Broadcasts end once `idle` is set, by the peers or by an abort."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.idle = threading.Event()
        self.numbers = itertools.count()
        self.ended = 0  # so many broadcasts, without all being at an end
        self.broken = False
        self.aborted: list[object] = []
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", self._synchronize)

    def abort(self, comm: object) -> None:
        self.aborted.append(comm)
        self.idle.set()

    def _synchronize(self, device: object) -> None:
        assert self.idle.wait(SOON_S), "the device waited for ever"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(nccl, "WATCH_POLL_S", 0.05)
    return Device(monkeypatch)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def communicator(device: Device, server: socket.socket, rank: int, timeout_s: float) -> NcclCommunicator:
    """As the constructor leaves it, without vLLM."""
    made = object.__new__(NcclCommunicator)
    made.rank, made.world_size, made.device = rank, 2, torch.device("cpu")
    made._store, made._server, made.timeout_s = None, server.getsockname(), timeout_s
    made._comm = SimpleNamespace(
        broadcast=lambda pointer, nbytes, src, stream: True, abort=lambda: device.abort("a comm")
    )
    made._begin_watching()
    return made


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broadcast_that_never_ends_is_aborted(device: Device, server: socket.socket, rank: int):
    group = communicator(device, server, rank, timeout_s=0.3)
    started = time.monotonic()
    group.broadcast(torch.zeros(1), src=0)
    with pytest.raises(GroupError, match=r"has not ended within 0\.3 s"):
        group.wait()
    assert 0.3 <= time.monotonic() - started < SOON_S
    assert device.aborted == ["a comm"]
    with pytest.raises(GroupError, match="make a new one"):
        group.broadcast(torch.zeros(1), src=0)
    group.close()


def test_where_rank_0_is_gone_the_others_do_not_wait_for_the_timeout(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=100)
    group.broadcast(torch.zeros(1), src=0)
    time.sleep(0.3)
    assert not device.aborted, "rank 0 still listens"
    server.close()
    with pytest.raises(GroupError, match="rank 0 is gone"):
        group.wait()
    group.close()


def test_what_nccl_refuses_is_aborted_at_once(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=100)
    group.broadcast(torch.zeros(1), src=0)
    group._comm.broadcast = refused
    with pytest.raises(GroupError, match="remote process exited; the group was aborted, make a new one"):
        group.broadcast(torch.zeros(1), src=0)
    assert device.aborted == ["a comm"], "or the first would stay on the device"
    with pytest.raises(GroupError, match="remote process exited"):
        group.wait()
    group.close()
    assert device.aborted == ["a comm"], "once"
    assert not group._watcher.is_alive()


@pytest.mark.parametrize(("call_s", "limit_s", "aborted_first"), [(0.6, 5.0, False), (1.0, 0.2, True)])
def test_an_abort_waits_for_a_call_into_nccl_but_not_for_ever(
    device: Device, server: socket.socket, monkeypatch, call_s: float, limit_s: float, aborted_first: bool
):
    monkeypatch.setattr(nccl, "CALL_S", limit_s)
    group = communicator(device, server, rank=1, timeout_s=0.1)
    group.broadcast(torch.zeros(1), src=0)
    seen: list[bool] = []

    def slow(*_: object) -> bool:
        time.sleep(call_s)
        seen.append(bool(device.aborted))
        return True

    group._comm.broadcast = slow
    group.broadcast(torch.zeros(1), src=0)
    with pytest.raises(GroupError, match="has not ended within"):
        group.wait()
    assert (seen, device.aborted) == ([aborted_first], ["a comm"])
    with pytest.raises(GroupError, match="make a new one"):
        group.broadcast(torch.zeros(1), src=0)
    assert len(seen) == 1, "expected no call once the group was given up"
    group.close()


def test_a_device_that_answers_with_an_error_is_no_end_of_the_watch(device: Device, server: socket.socket):
    device.broken = True
    group = communicator(device, server, rank=1, timeout_s=0.3)
    group.broadcast(torch.zeros(1), src=0)
    with pytest.raises(GroupError, match="has not ended within"):
        group.wait()
    assert device.aborted == ["a comm"]
    group.close()


def test_a_watch_that_fails_gives_the_group_up(device: Device, server: socket.socket, monkeypatch):
    group = communicator(device, server, rank=1, timeout_s=100)
    monkeypatch.setattr(group, "_ask", lambda: 1 / 0)
    group.broadcast(torch.zeros(1), src=0)
    with pytest.raises(GroupError, match="could not be watched: ZeroDivisionError"):
        group.wait()
    group.close()


def test_the_timeout_is_for_each_broadcast_not_for_all_that_wait_their_turn(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=0.5)
    for _ in range(10):
        group.broadcast(torch.zeros(1), src=0)
    for _ in range(10):
        time.sleep(0.1)
        device.ended += 1
    device.idle.set()
    group.wait()
    assert not device.aborted
    group.close()


def test_a_rank_0_that_leaves_when_all_has_arrived_is_no_loss(device: Device, server: socket.socket, monkeypatch):
    group = communicator(device, server, rank=1, timeout_s=100)

    def gone(address: tuple[str, int]) -> bool:
        device.idle.set()  # between the question and the answer
        return False

    monkeypatch.setattr(nccl, "listens", gone)
    group.broadcast(torch.zeros(1), src=0)
    group.wait()
    time.sleep(0.2)
    assert not device.aborted
    group.close()


def test_rank_0_does_not_look_for_itself(device: Device, server: socket.socket):
    group = communicator(device, server, rank=0, timeout_s=100)
    group.broadcast(torch.zeros(1), src=0)
    server.close()
    time.sleep(0.4)
    assert not device.aborted
    device.idle.set()
    group.close()
    assert device.aborted == ["a comm"]


def test_an_abort_that_does_not_return_keeps_nobody(device: Device, server: socket.socket, monkeypatch):
    monkeypatch.setattr(nccl, "ABORT_S", 0.3)
    release, aborts = threading.Event(), []
    group = communicator(device, server, rank=1, timeout_s=100)
    group._comm.abort = lambda: (aborts.append(1), release.wait(SOON_S))
    group._comm.broadcast = refused
    started = time.monotonic()
    with pytest.raises(GroupError, match="remote process exited"):
        group.broadcast(torch.zeros(1), src=0)
    group.close()
    assert time.monotonic() - started < SOON_S / 2
    assert aborts == [1], "it is being aborted"
    release.set()


def test_who_finds_out_second_aborts_nothing_and_asks_in_no_further_thread(
    device: Device, server: socket.socket, monkeypatch
):
    threads: list[object] = []
    in_a_thread = nccl.in_a_thread
    monkeypatch.setattr(nccl, "in_a_thread", lambda f: threads.append(f) or in_a_thread(f))
    group = communicator(device, server, rank=1, timeout_s=0.4)
    group.broadcast(torch.zeros(1), src=0)
    with pytest.raises(GroupError, match="has not ended"):
        group.wait()
    group._give_up("the other found out too")
    with pytest.raises(GroupError, match="has not ended"):
        group.wait()
    group.close()
    assert device.aborted == ["a comm"]
    assert len(threads) == 2, "one to ask, one to abort"


def test_a_tensor_that_can_not_be_sent_leaves_the_group_alone(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=100)
    with pytest.raises(ValueError, match="contiguous"):
        group.broadcast(torch.zeros(4, 4).t(), src=0)
    assert not device.aborted
    group.close()


def test_a_group_at_rest_starts_no_threads(device: Device, server: socket.socket, monkeypatch):
    group = communicator(device, server, rank=1, timeout_s=100)
    started = []
    monkeypatch.setattr(nccl, "in_a_thread", started.append)
    time.sleep(0.3)
    assert started == []
    group.close()


def test_who_is_told_of_a_loss_finds_the_device_free(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=0.2)
    group._comm.abort = lambda: (time.sleep(0.5), device.abort("a comm"))
    group.broadcast(torch.zeros(1), src=0)
    while not group._lost:
        time.sleep(0.01)
    with pytest.raises(GroupError, match="has not ended"):
        group.broadcast(torch.zeros(1), src=0)
    assert device.aborted == ["a comm"]
    group.close()


def refused(pointer: int, nbytes: int, src: int, stream: int) -> bool:
    raise NcclError("NCCL error: remote process exited")


def test_a_call_that_nccl_leaves_in_progress_is_waited_for(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=100)
    answers = [False] * 20
    group._comm.broadcast = lambda pointer, nbytes, src, stream: False
    group._comm.settled = lambda: not answers or answers.pop()
    group.broadcast(torch.zeros(1), src=0)
    assert (answers, device.aborted) == ([], [])
    device.idle.set()
    group.wait()
    group.close()


def test_a_call_that_nccl_never_ends_is_given_up(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=0.3)
    group._comm.broadcast = lambda pointer, nbytes, src, stream: False
    group._comm.settled = lambda: False
    with pytest.raises(GroupError, match=r"NCCL has not taken a broadcast within 0\.3 s"):
        group.broadcast(torch.zeros(1), src=0)
    assert device.aborted == ["a comm"]
    group.close()


@pytest.mark.parametrize("inside", ["the call", "wait"])
def test_an_abort_from_another_thread_ends_a_call_and_a_wait(device: Device, server: socket.socket, inside: str):
    group = communicator(device, server, rank=0, timeout_s=100)
    if inside == "the call":
        group._comm.broadcast = lambda pointer, nbytes, src, stream: False
        group._comm.settled = lambda: False
    began_s = time.monotonic()
    threading.Timer(0.2, group.abort, ["the optimiser failed"]).start()
    if inside == "wait":
        group.broadcast(torch.zeros(1), src=0)
    blocked = group.wait if inside == "wait" else lambda: group.broadcast(torch.zeros(1), src=0)
    with pytest.raises(GroupError, match="rank 0: the optimiser failed; the group was aborted, make a new one"):
        blocked()
    assert 0.2 <= time.monotonic() - began_s < 10
    assert device.aborted == ["a comm"]
    group.close()
    group.abort("too late")
    assert device.aborted == ["a comm"]


def test_what_ends_in_time_is_left_alone_however_long_the_group_lives(device: Device, server: socket.socket):
    group = communicator(device, server, rank=1, timeout_s=0.2)
    device.idle.set()
    for _ in range(3):
        group.broadcast(torch.zeros(1), src=0)
        group.wait()
        time.sleep(0.15)
    assert not device.aborted
    group.close()
    assert device.aborted == ["a comm"], "expected close() to give back what NCCL has"
    assert not group._watcher.is_alive()
    with pytest.raises(GroupError, match="closed"):
        group.broadcast(torch.zeros(1), src=0)
