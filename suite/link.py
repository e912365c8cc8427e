"""The line between a trainer and an engine: what a real training loop would send by Ray or HTTP.

Manifests, acknowledgements and handles go from trainer to engine directly, over a Unix socket, as plain data
(suite.wire). pytest is not on the way, so what is measured has no hop that a training loop would not have.
"""

import socket
import time
from pathlib import Path
from typing import Any

from suite import wire

CALLED_OFF = "the trainer called the update off"


class LinkError(RuntimeError):
    """The other side of a link is gone, silent, or refuses what was sent."""


class Link:
    """One connected line. Both sides call `send` and `receive`."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock, self._peer = sock, peer

    def send(self, message: dict[str, Any], deadline_s: float) -> None:
        """Send plain data. Raises LinkError where the peer is gone or takes nothing for `deadline_s`."""
        try:
            self._sock.settimeout(deadline_s)
            wire.send(self._sock, message)
        except OSError as error:
            raise LinkError(f"{self._peer} could not be sent {sorted(message)}: {error!r}") from error

    def receive(self, deadline_s: float) -> dict[str, Any]:
        """The next message. Raises LinkError where the peer is gone or has sent none for `deadline_s`."""
        deadline = time.monotonic() + deadline_s
        try:
            return wire.receive(self._sock, wait=lambda: self._sock.settimeout(_left(deadline)))
        except TimeoutError:
            raise LinkError(f"{self._peer} sent nothing for {deadline_s:g} s") from None
        except (EOFError, OSError, wire.WireError) as error:
            raise LinkError(f"{self._peer} is gone or sends nonsense: {error!r}") from error

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


class Listener:
    """Where an engine waits for its trainers' ranks."""

    def __init__(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(path)
        self._sock.listen()

    def accept(self, deadline_s: float) -> Link:
        """The next trainer rank that connects. Raises LinkError where none comes within `deadline_s`."""
        self._sock.settimeout(deadline_s)
        try:
            connected, _ = self._sock.accept()
        except TimeoutError:
            raise LinkError(f"no trainer connected within {deadline_s:g} s") from None
        return Link(connected, "the trainer")

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


def connect(path: str, deadline_s: float) -> Link:
    """Connect to an engine's listener."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(deadline_s)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise LinkError(f"no engine listens at {path}: {error!r}") from error
    return Link(sock, f"the engine at {Path(path).name}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
