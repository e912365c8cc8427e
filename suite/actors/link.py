"""The line between a trainer and an engine: what a real training loop would send by Ray or HTTP.

Manifests, acknowledgements and handles go from trainer to engine directly, over a Unix socket, as plain data
(suite.processes.wire). pytest is not on the way, so what is measured has no hop that a training loop would not have.
"""

import os
import selectors
import socket
import time
from pathlib import Path
from typing import Any

from suite.processes import wire
from suite.processes.blame import SuiteFault

GREETING = b"weight-sync 1\n"  # sent first by a trainer's rank; any other peer is disconnected
STRANGERS = 16  # how many peers that say nothing are kept waiting


class LinkError(RuntimeError):
    """The other side of a link is gone, silent, or refuses what was sent."""

    examined, echo = False, True


class Silent(LinkError):
    """The other side of a link is there, and says nothing."""


class Link:
    """One connected line. Both sides call `send` and `receive`."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock, self.peer = sock, peer

    def send(self, message: dict[str, Any], deadline_s: float) -> None:
        """Send plain data. Raises LinkError where the peer is gone or takes nothing for `deadline_s`."""
        try:
            self._sock.settimeout(deadline_s)
            wire.send(self._sock, message)
        except OSError as error:
            raise LinkError(f"{self.peer} could not be sent {sorted(message)}: {error!r}") from error

    def receive(self, deadline_s: float) -> dict[str, Any]:
        """The next message. Raises LinkError where the peer is gone or sends nonsense, Silent after `deadline_s`."""
        deadline = time.monotonic() + deadline_s
        try:
            message = wire.receive(self._sock, wait=lambda: self._sock.settimeout(_left(deadline)))
        except TimeoutError:
            raise Silent(f"{self.peer} sent nothing for {deadline_s:g} s") from None
        except (EOFError, OSError, wire.WireError) as error:
            raise LinkError(f"{self.peer} is gone or sends nonsense: {error!r}") from error
        if not isinstance(message, dict):
            raise LinkError(f"{self.peer} sends nonsense: expected a mapping, found {message!r:.80}")
        return message

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


class Listener:
    """Where an engine waits for its trainers' ranks. Only this user's processes can connect."""

    def __init__(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        self._waiting: list[socket.socket] = []  # those that connected and have not spoken
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(path)
        os.chmod(path, 0o600)  # before anyone can connect
        self._sock.listen()

    def accept(self, deadline_s: float) -> Link:
        """The next trainer rank that connects. Raises SuiteFault where none comes within `deadline_s`.

        Peers that don't greet as one are sent away; one that says nothing keeps nobody waiting.
        """
        deadline, sent_away = time.monotonic() + deadline_s, 0
        while time.monotonic() < deadline:
            for sock in self._ready(deadline):
                self._waiting.remove(sock)
                if _greets(sock):
                    return Link(sock, "the trainer")
                sock.close()
                sent_away += 1
        strangers = f"; {sent_away} that did not greet as one were sent away" if sent_away else ""
        raise SuiteFault(f"no trainer connected within {deadline_s:g} s{strangers}")

    def close(self) -> None:
        """Stop listening."""
        for sock in (self._sock, *self._waiting):
            sock.close()

    def _ready(self, deadline: float) -> list[socket.socket]:
        """Those that have spoken or gone, in the order of connecting, once there are any."""
        with selectors.DefaultSelector() as selector:
            for sock in (self._sock, *self._waiting):
                selector.register(sock, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
        if self._sock in ready:
            self._waiting.append(self._sock.accept()[0])
        if len(self._waiting) > STRANGERS:
            self._waiting.pop(0).close()
        return [sock for sock in self._waiting if sock in ready]


def connect(path: str, deadline_s: float) -> Link:
    """Connect to an engine's listener, as a trainer's rank. Raises SuiteFault where nothing listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(deadline_s)
    try:
        sock.connect(path)
        sock.sendall(GREETING)
    except OSError as error:
        sock.close()
        raise SuiteFault(f"no engine listens at {path}: {error!r}") from error
    return Link(sock, f"the engine at {Path(path).name}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _greets(sock: socket.socket) -> bool:
    """Whether what has arrived begins with the greeting. It is so short that it arrives whole."""
    sock.setblocking(False)
    try:
        return sock.recv(len(GREETING)) == GREETING
    except OSError:
        return False
