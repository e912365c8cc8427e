"""A rank of a trainer: what its subject's half gets, when a fault strikes, and what engines are told."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from extensions.manifest import manifest_of
from suite.actors import sending
from suite.actors.dialogue import CALLED_OFF, Cancelled, EngineSide, NotAnnounced, NotStarted, TrainersHalfFailed
from suite.actors.link import Link, LinkError
from suite.actors.roofline import Roofline
from suite.actors.sending import Fault, Outgoing, Sending
from suite.actors.trainer import Trainer as ModelTrainer
from suite.processes.blame import SuiteFault
from suite.subjects.protocol import TrainerHalf

DEADLINE_S = 20.0
NAMES = ["a", "b", "c", "d"]


class Trainer:
    """One rank, with four tensors of two elements; counts what was gathered."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.gathered = 0

    def named_tensors(self, order: str, alter: dict | None) -> Iterator[tuple[str, torch.Tensor]]:
        for name in NAMES:
            self.gathered += 1
            yield name, torch.ones(2)

    def manifest(self, order: str, alter: dict | None) -> list[dict]:
        return manifest_of((name, torch.empty(2, device="meta")) for name in NAMES)


class Half(TrainerHalf):
    """Sends nothing, or raises."""

    raises: Exception | None = None
    released = 0

    def __init__(self) -> None:
        pass

    def announce(self, tensors: Outgoing) -> dict[str, Any]:
        return {"more": 7}

    def send(self, tensors: Outgoing, acknowledged: Callable[[], None]) -> int:
        if self.raises:
            raise self.raises
        return sum(tensor.numel() for _, tensor in tensors)

    def release(self) -> None:
        self.released += 1


class Subject:
    """Every rank speaks."""

    def speakers(self, world_size: int) -> int:
        return world_size


@pytest.fixture
def rank() -> Iterator[tuple[Sending, EngineSide]]:
    ours, theirs = socket.socketpair()
    rank = Sending(Trainer())
    rank._subject, rank._half, rank._links = Subject(), Half(), (Link(ours, "the engine"),)
    yield rank, EngineSide([Link(theirs, "the trainer")], DEADLINE_S)
    for end in (ours, theirs):
        with contextlib.suppress(OSError):
            end.close()


def engine(side: EngineSide, heard: list) -> threading.Thread:
    """An engine that takes what is announced, and ends the update if it may."""

    def serve() -> None:
        try:
            heard.extend(side.announced())
            side.expect_go()
            side.ended()
        except (Cancelled, TrainersHalfFailed) as error:
            heard.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("held", [True, False])
def test_a_fault_strikes_half_way_and_what_is_held_is_gathered_once(monkeypatch: pytest.MonkeyPatch, held: bool):
    struck: list[int] = []
    trainer, fault = Trainer(), Fault({"moment": "during", "signal": "STOP", "pid": 7})
    monkeypatch.setattr(sending.os, "kill", lambda pid, number: struck.append(pid))
    tensors = Outgoing(trainer, "checkpoint", None, fault)
    if held:
        assert [name for name, _ in tensors.held()] == NAMES
    assert [entry["name"] for entry in tensors.manifest()] == NAMES
    assert not struck
    sent = iter(tensors)
    assert [next(sent)[0], next(sent)[0]] == ["a", "b"]
    assert not struck
    assert [name for name, _ in sent] == ["c", "d"]
    assert (struck, trainer.gathered) == ([7], 4)


def test_an_update_is_announced_sent_and_released(rank: tuple[Sending, EngineSide]):
    heard: list = []
    serving = engine(rank[1], heard)
    found = rank[0].update(DEADLINE_S)
    serving.join(DEADLINE_S)
    assert (found["bytes_sent"], found["tensors"], rank[0]._half.released) == (8, 4, 1)
    assert heard[0].keys() == {"manifest", "more"}


def test_an_update_that_is_called_off_is_refused_on_both_sides(rank: tuple[Sending, EngineSide]):
    heard: list = []
    serving = engine(rank[1], heard)
    with pytest.raises(NotStarted, match=CALLED_OFF):
        rank[0].update(DEADLINE_S, call_off=True)
    serving.join(DEADLINE_S)
    assert isinstance(heard[-1], Cancelled)
    assert rank[0]._half.released == 1


def test_an_engine_hears_of_a_half_that_fails_before_it_announces(rank: tuple[Sending, EngineSide]):
    heard: list = []
    serving = engine(rank[1], heard)
    rank[0]._half.announce = None  # which cannot be called
    with pytest.raises(TypeError):
        rank[0].update(DEADLINE_S)
    serving.join(DEADLINE_S)
    assert "TypeError" in str(heard[-1])


@pytest.mark.parametrize(("hangs", "raised"), [("gather", SuiteFault), ("announce", NotAnnounced)])
def test_who_keeps_an_engine_waiting_is_told_apart(rank: tuple[Sending, EngineSide], hangs: str, raised: type):
    """What the suite gathers is its own affair; once the sender has it, the sender is waited for."""
    go = threading.Event()
    setattr(rank[0]._half, hangs, lambda tensors: go.wait(DEADLINE_S) and {})
    rank[1]._deadline_s = 0.5

    def update() -> None:
        with contextlib.suppress(LinkError):
            rank[0].update(DEADLINE_S)

    updating = threading.Thread(target=update, daemon=True)
    updating.start()
    with pytest.raises(raised):
        rank[1].announced()
    rank[1]._lines[0]._link.close()
    go.set()
    updating.join(DEADLINE_S)
    assert not updating.is_alive()


def test_what_a_sender_raises_is_raised_and_what_it_handed_over_is_kept(rank: tuple[Sending, EngineSide]):
    serving = engine(rank[1], [])
    rank[0]._half.raises = ValueError("no memory")
    with pytest.raises(ValueError, match="no memory"):
        rank[0].update(DEADLINE_S)
    serving.join(DEADLINE_S)
    assert rank[0]._half.released == 0


def test_a_sender_that_can_not_be_closed_does_not_spoil_the_next_subject(
    rank: tuple[Sending, EngineSide], capsys: pytest.CaptureFixture
):
    class Stubborn(Half):
        def close(self) -> None:
            raise ValueError("still busy")

    rank[0]._half = Stubborn()
    rank[0].close()
    assert (rank[0]._half, rank[0]._links) == (None, ())
    assert "could not be closed: ValueError: still busy" in capsys.readouterr().out


def test_the_other_ranks_gather_to_the_end_when_the_one_that_sends_fails(rank: tuple[Sending, EngineSide]):
    class OneSpeaks:
        def speakers(self, world_size: int) -> int:
            return 1

    def take_one_and_raise(tensors: Outgoing, acknowledged: Callable[[], None]) -> int:
        next(iter(tensors))
        raise ValueError("no memory")

    serving = engine(rank[1], [])
    rank[0]._trainer.world_size, rank[0]._subject = 2, OneSpeaks()
    rank[0]._all_agree = lambda go: go
    rank[0]._half.send = take_one_and_raise
    with pytest.raises(ValueError, match="no memory"):
        rank[0].update(DEADLINE_S)
    serving.join(DEADLINE_S)
    assert rank[0]._trainer.gathered == len(NAMES), "expected each tensor to be gathered once, as the other ranks do"


def test_a_roofline_that_fails_is_the_suites_fault(monkeypatch: pytest.MonkeyPatch):
    roofline = Roofline(torch.device("cpu"))
    with pytest.raises(SuiteFault, match="could not broadcast for a roofline: AttributeError"):
        roofline.send(64)
    monkeypatch.setattr("suite.actors.roofline.stateless_init_process_group", lambda *args: 1 / 0)
    with pytest.raises(SuiteFault, match="could not join the roofline's group: ZeroDivisionError"):
        roofline.join("127.0.0.1", 1, 2)


def test_a_trainer_that_lets_go_releases_what_a_failed_update_has_left(
    rank: tuple[Sending, EngineSide], capsys: pytest.CaptureFixture
):
    trainer = ModelTrainer.__new__(ModelTrainer)
    trainer.device = torch.device("cpu")
    trainer._sending, trainer._roofline, trainer._kept = rank[0], Roofline(trainer.device), {}
    trainer._roofline._buffer = torch.ones(1)
    trainer.forget()
    assert (rank[0]._half.released, trainer._roofline._buffer) == (1, None)
    rank[0]._half.release = None  # which cannot be called
    trainer.forget()
    assert "could not release what it held: TypeError" in capsys.readouterr().out
