"""While a trainer sends it hears of engines that refuse, end or go, and the sending ends in time."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from suite.actors.attending import _Attending, send_attended
from suite.actors.dialogue import ENDED, REFUSED, TOLD_S, Refused, TrainerSide
from suite.actors.link import Link, LinkError

DEADLINE_S = 20.0


class Sender:
    """Sends until it is aborted, or at once where there is nothing to wait for."""

    only_waits = False

    def __init__(self, stuck: bool = False) -> None:
        self.aborted: list[str] = []
        self._go = threading.Event()
        if not stuck:
            self._go.set()

    def send(self, tensors: object, acknowledged: Callable[[], None]) -> int:
        if not self._go.wait(DEADLINE_S):
            raise TimeoutError("nobody has aborted this sender")
        if self.aborted:
            raise RuntimeError("aborted")
        return 7

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)
        self._go.set()


@pytest.fixture
def lines() -> Iterator[tuple[Link, Link]]:
    """(the trainer's end, the engine's end)."""
    ours, theirs = socket.socketpair()
    yield Link(ours, "the engine"), Link(theirs, "the trainer")
    for end in (ours, theirs):
        with contextlib.suppress(OSError):
            end.close()


def send(sender: Sender, *engines: Link, deadline_s: float = DEADLINE_S) -> int:
    trainer = TrainerSide(engines, deadline_s)
    for line in trainer.lines:
        line.state = "moving"
    return send_attended(sender, [], trainer, lambda: None)


def test_what_was_sent_and_acknowledged_is_counted(lines: tuple[Link, Link]):
    lines[1].send({ENDED: True}, DEADLINE_S)
    assert send(Sender(), lines[0]) == 7


def test_an_engine_that_refuses_ends_the_sending(lines: tuple[Link, Link]):
    sender, began_s = Sender(stuck=True), time.monotonic()
    lines[1].send({REFUSED: "no room"}, DEADLINE_S)
    with pytest.raises(Refused, match="no room"):
        send(sender, lines[0])
    assert sender.aborted == ["no room"]
    assert time.monotonic() - began_s < TOLD_S


def test_an_engine_that_is_gone_ends_the_sending(lines: tuple[Link, Link]):
    sender = Sender(stuck=True)
    lines[1].close()
    with pytest.raises(Refused, match="an engine was lost during the transfer"):
        send(sender, lines[0])
    assert len(sender.aborted) == 1


def test_a_sender_that_goes_on_after_all_engines_have_ended_is_aborted(lines: tuple[Link, Link]):
    sender, began_s = Sender(stuck=True), time.monotonic()
    lines[1].send({ENDED: True}, DEADLINE_S)
    with pytest.raises(Refused, match="all engines ended the update"):
        send(sender, lines[0])
    assert TOLD_S <= time.monotonic() - began_s < 2 * TOLD_S


def test_one_engine_that_has_ended_is_no_reason_to_stop_sending_to_another(lines: tuple[Link, Link]):
    ours, theirs = socket.socketpair()
    sender = Sender(stuck=True)
    lines[1].send({ENDED: True}, DEADLINE_S)
    other = Link(theirs, "the trainer")
    threading.Timer(1.5 * TOLD_S, other.send, ({REFUSED: "too late"}, DEADLINE_S)).start()
    with pytest.raises(Refused, match="too late"):
        send(sender, lines[0], Link(ours, "the other engine"))
    other.close()


def test_what_the_sender_raises_comes_first_and_its_engines_are_let_go(lines: tuple[Link, Link]):
    class Broken(Sender):
        def send(self, tensors: object, acknowledged: Callable[[], None]) -> int:
            raise ValueError("a bug of its own")

    sender = Broken()
    with pytest.raises(ValueError, match="a bug of its own"):
        send(sender, lines[0])
    assert sender.aborted == ["the trainer's sender raised ValueError: a bug of its own"]


def test_an_engine_that_refuses_after_all_was_sent_is_heard(lines: tuple[Link, Link]):
    sender = Sender()
    threading.Timer(0.3, lines[1].send, ({REFUSED: "one is missing"}, DEADLINE_S)).start()
    with pytest.raises(Refused, match="one is missing"):
        send(sender, lines[0])
    assert not sender.aborted


def test_a_silent_engine_is_an_error_in_time(lines: tuple[Link, Link]):
    with pytest.raises(LinkError, match=r"sent nothing for 0\.5 s"):
        send(Sender(), lines[0], deadline_s=0.5)


def test_a_sender_that_comes_back_from_an_aborted_group_has_not_sent(lines: tuple[Link, Link]):
    class Careless(Sender):
        def send(self, tensors: object, acknowledged: Callable[[], None]) -> int:
            self._go.wait(DEADLINE_S)
            return 7

    sender = Careless(stuck=True)
    lines[1].send({ENDED: True}, DEADLINE_S)
    with pytest.raises(Refused, match="all engines ended the update"):
        send(sender, lines[0])
    assert len(sender.aborted) == 1


def test_nothing_is_aborted_once_all_was_sent(lines: tuple[Link, Link]):
    trainer = TrainerSide(lines[:1], DEADLINE_S)
    attending, sender = _Attending(Sender(), trainer), Sender()
    attending._sender = sender
    attending.expect_whole()
    lines[1].close()
    with pytest.raises(LinkError):
        attending.expect_ended()
    assert (sender.aborted, attending.reason) == ([], "")


def test_whoever_hears_of_an_engine_knows_why_the_sending_ends(lines: tuple[Link, Link]):
    class Asks(Sender):
        def send(self, tensors: object, acknowledged: Callable[[], None]) -> int:
            acknowledged()
            raise AssertionError("no engine has ended")

    lines[1].close()
    for _ in range(50):
        with pytest.raises(Refused, match="an engine was lost"):
            send(Asks(), lines[0])


class Waits(Sender):
    """Hands something over, and waits."""

    only_waits = True

    def send(self, tensors: object, acknowledged: Callable[[], None]) -> int:
        acknowledged()
        return 7


def test_a_sender_that_only_waits_listens_itself(lines: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch):
    ours, theirs = lines
    monkeypatch.setattr(threading, "Thread", None)
    theirs.send({ENDED: True}, DEADLINE_S)
    assert send(Waits(), ours) == 7


def test_it_hears_of_a_refusal(lines: tuple[Link, Link]):
    ours, theirs = lines
    theirs.send({REFUSED: "no such plan"}, DEADLINE_S)
    with pytest.raises(Refused, match="no such plan"):
        send(Waits(), ours)


@pytest.mark.parametrize("gone", [True, False])
def test_it_hears_of_engines_that_are_gone_or_silent_within_one_deadline(lines: tuple[Link, Link], gone: bool):
    ours, theirs = lines
    if gone:
        theirs.close()
    silent, other = socket.socketpair()
    began = time.monotonic()
    with pytest.raises(LinkError, match="gone" if gone else "sent nothing"):
        send(Waits(), ours, Link(silent, "another engine"), deadline_s=0.5)
    assert time.monotonic() - began < 1.5
    silent.close()
    other.close()
