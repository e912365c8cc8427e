"""The line between trainer and engine: what is sent arrives; a dead, silent or wild peer is an error in time."""

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest

from suite.actors import link
from suite.actors.link import Link, LinkError, Listener
from suite.processes.blame import SuiteFault

DEADLINE_S, SHORT_S = 10.0, 0.3


@pytest.fixture
def pair(listener: Listener, socket_path: str) -> Iterator[tuple[Link, Link]]:
    """(the trainer's end, the engine's end)."""
    trainer = link.connect(socket_path, DEADLINE_S)
    engine = listener.accept(DEADLINE_S)
    yield trainer, engine
    trainer.close()
    engine.close()


@pytest.fixture
def wild() -> Iterator[tuple[socket.socket, Link]]:
    """A peer that sends what it likes."""
    here, there = socket.socketpair()
    with here:
        yield here, Link(there, "the peer")
        there.close()


def failing(call: Callable[[], object], said: str, within_s: float = SHORT_S, raises: type = LinkError) -> None:
    started = time.monotonic()
    with pytest.raises(raises, match=said):
        call()
    assert time.monotonic() - started < within_s + 1


# ---- what arrives


def test_messages_go_both_ways_in_order(pair: tuple[Link, Link]):
    trainer, engine = pair
    for number in range(3):
        trainer.send({"number": number, "blob": b"\0\xff", "shape": (2, 3)}, DEADLINE_S)
    engine.send({"ready": True}, DEADLINE_S)
    for number in range(3):
        assert engine.receive(DEADLINE_S) == {"number": number, "blob": b"\0\xff", "shape": [2, 3]}
    assert trainer.receive(DEADLINE_S) == {"ready": True}


def test_a_large_message_arrives_whole(pair: tuple[Link, Link]):
    message = {"handles": {str(number): os.urandom(50) for number in range(20_000)}}
    sending = threading.Thread(target=pair[0].send, args=(message, DEADLINE_S))
    sending.start()
    assert pair[1].receive(DEADLINE_S) == message
    sending.join(DEADLINE_S)


def test_several_trainers_are_told_apart(listener: Listener, socket_path: str):
    trainers = [link.connect(socket_path, DEADLINE_S) for _ in range(3)]
    engines = [listener.accept(DEADLINE_S) for _ in range(3)]
    for number, trainer in enumerate(trainers):
        trainer.send({"rank": number}, DEADLINE_S)
    assert [engine.receive(DEADLINE_S)["rank"] for engine in engines] == [0, 1, 2]


def test_what_is_no_plain_data_is_refused_where_it_is_sent(pair: tuple[Link, Link]):
    with pytest.raises(TypeError, match=r"found builtins\.object"):
        pair[0].send({"callable": object()}, DEADLINE_S)
    pair[0].send({"after": 1}, DEADLINE_S)
    assert pair[1].receive(DEADLINE_S) == {"after": 1}, "expected nothing of the refused message on the line"


# ---- nobody there


def test_connecting_where_nobody_listens_says_where(socket_path: str):
    failing(
        lambda: link.connect(socket_path, DEADLINE_S),
        "no engine listens at .*engine.sock: FileNotFoundError",
        raises=SuiteFault,
    )


def test_connecting_to_an_engine_that_has_gone_says_so(listener: Listener, socket_path: str):
    listener.close()
    failing(
        lambda: link.connect(socket_path, DEADLINE_S),
        "no engine listens at .*ConnectionRefusedError",
        raises=SuiteFault,
    )


def test_an_engine_takes_the_place_of_one_that_has_gone(listener: Listener, socket_path: str):
    listener.close()
    other = Listener(socket_path)
    trainer = link.connect(socket_path, DEADLINE_S)
    other.accept(DEADLINE_S)
    trainer.close()
    other.close()


def test_awaiting_a_trainer_has_a_deadline(listener: Listener):
    failing(lambda: listener.accept(SHORT_S), r"no trainer connected within 0\.3 s", raises=SuiteFault)


# ---- dead and silent peers


def test_a_silent_peer_is_an_error_after_the_deadline(pair: tuple[Link, Link]):
    started = time.monotonic()
    failing(lambda: pair[0].receive(SHORT_S), r"the engine at engine\.sock sent nothing for 0\.3 s")
    assert time.monotonic() - started >= SHORT_S
    failing(lambda: pair[1].receive(SHORT_S), r"the trainer sent nothing for 0\.3 s")


def test_a_peer_that_trickles_is_as_good_as_silent(wild: tuple[socket.socket, Link]):
    """The deadline is for the whole message."""
    here, there = wild
    here.sendall(struct.pack(">QI", 100, 0))
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.05):
            here.send(b" ")

    thread = threading.Thread(target=trickle)
    thread.start()
    failing(lambda: there.receive(SHORT_S), "the peer sent nothing for")
    stop.set()
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("deadline_s", [0, -1])
def test_a_deadline_that_has_passed_is_an_error_at_once(pair: tuple[Link, Link], deadline_s: float):
    failing(lambda: pair[0].receive(deadline_s), "sent nothing")


def test_a_peer_that_hung_up_is_gone(pair: tuple[Link, Link]):
    trainer, engine = pair
    trainer.send({"last": 1}, DEADLINE_S)
    trainer.close()
    assert engine.receive(DEADLINE_S) == {"last": 1}
    failing(lambda: engine.receive(DEADLINE_S), "the trainer is gone or")
    failing(lambda: engine.send({"ready": True}, DEADLINE_S), r"the trainer could not be sent \['ready'\]: BrokenPipe")


def test_a_peer_that_hangs_up_is_noticed_by_one_that_waits(pair: tuple[Link, Link]):
    timer = threading.Timer(SHORT_S, pair[0]._sock.shutdown, [socket.SHUT_RDWR])
    timer.start()
    failing(lambda: pair[1].receive(DEADLINE_S), "the trainer is gone or", within_s=SHORT_S)
    timer.join(DEADLINE_S)


def test_a_peer_that_takes_nothing_is_an_error_after_the_deadline(pair: tuple[Link, Link]):
    failing(lambda: pair[0].send({"blob": bytes(10_000_000)}, SHORT_S), r"could not be sent \['blob'\]: TimeoutError")


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0", struct.pack(">QI", 5, 0) + b"abc", struct.pack(">QI", 2, zlib.crc32(b"{x")) + b"{x", b"\xff" * 16,
        struct.pack(">QI", 2, 0) + b"{}", struct.pack(">QI", 2, zlib.crc32(b"[]")) + b"[]", b"GET / HTTP/1.1\r\n\r\n",
    ],
)  # fmt: skip
def test_a_peer_that_dies_within_a_message_or_sends_garbage_is_a_link_error(
    wild: tuple[socket.socket, Link], data: bytes
):
    here, there = wild
    here.sendall(data)
    here.shutdown(socket.SHUT_WR)
    failing(lambda: there.receive(DEADLINE_S), "the peer (is gone or )?sends nonsense")


def test_a_line_that_was_closed_here_is_an_error(pair: tuple[Link, Link]):
    pair[0].close()
    failing(lambda: pair[0].receive(DEADLINE_S), "is gone")
    failing(lambda: pair[0].send({"a": 1}, DEADLINE_S), "could not be sent")
