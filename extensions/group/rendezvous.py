"""Where the ranks of a group find each other."""

import contextlib
import errno
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch

from extensions.group.basics import GroupError, first_line, in_a_thread

HANDSHAKE_POLL_S = 0.02
PRESENCE_POLL_S = 0.5
ADDRESS_S = 5.0  # for one address of a name to answer: it may have others
SHOWN_BYTES = 1000
LINGER_S = 2.0  # how long rank 0 stays after a refusal, for the others to hear of it
JOIN_TIMEOUT_VARIABLE = "WEIGHT_UPDATE_JOIN_TIMEOUT_S"
T = TypeVar("T")


class Rendezvous:
    """A store of text that rank 0 serves. No rank goes on, or fails, without the others.

    All waits together end `timeout_s` after it was made. A rank that gives up says why in the store, where every rank
    that waits looks all the time: all raise the same.
    """

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.server = rank, world_size, (address, port)
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._where = f"rank {rank} of {world_size} at {address}:{port}"
        self.store: torch.distributed.TCPStore | None = None  # None once this rank has left
        listening = self._listen() if rank == 0 else None
        # The address by which this host is known to the others.
        self.local_address: str = listening.getsockname()[0] if listening else self._await_server()
        opening = in_a_thread(lambda: self._open(listening))  # waits for ever where something silent listens
        try:
            self.store = self._opened(opening)
        except torch.distributed.DistError as error:
            hint = "are address and port the trainer's (rank 0's) own?"
            raise GroupError(f"{self._where}: no rendezvous; {hint} ({first_line(error)})") from error

    def _opened(self, opening: "futures.Future[torch.distributed.TCPStore]") -> torch.distributed.TCPStore:
        deadline = time.monotonic() + max(1.0, self.left_s)
        while not futures.wait([opening], PRESENCE_POLL_S).done:
            if self.rank != 0 and not listens(self.server):
                raise GroupError(f"{self._where}: rank 0, which serves the rendezvous, has been there and is gone")
            if time.monotonic() > deadline:
                raise GroupError(f"{self._where}: what listens there does not answer as rank 0 would")
        return opening.result()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline of all waits."""
        return self._deadline - time.monotonic()

    def _listen(self) -> socket.socket:
        """The socket of rank 0, at its address alone: TCPStore's own would listen on all interfaces."""
        address, port = self.server
        try:
            found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            family, _, _, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)
            return socket.create_server(where[:2], family=family)
        except socket.gaierror as error:
            raise GroupError(f"{self._where}: {address!r} is no address and no host's name ({error})") from error
        except OSError as error:
            hint = "is the port taken?"
            if error.errno == errno.EADDRNOTAVAIL:
                hint = (
                    f"{address} is no address of this host, and rank 0 listens at its own; give all ranks one that"
                    " `hostname -I` lists here and that the workers reach"
                )
            raise GroupError(f"{self._where}: no rendezvous; {hint} ({first_line(error)})") from error

    def _open(self, listening: socket.socket | None) -> torch.distributed.TCPStore:
        if listening is None:
            return self.client()
        return torch.distributed.TCPStore(
            self.local_address,
            self.server[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout_s),
            master_listen_fd=listening.detach(),
        )

    def client(self) -> torch.distributed.TCPStore:
        """One more connection to the store, for a thread of its own: it fails as soon as rank 0 leaves."""
        address, port = (self.local_address if self.rank == 0 else self.server[0]), self.server[1]
        timeout = timedelta(seconds=max(1.0, self.left_s))
        return torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def _await_server(self) -> str:
        """Wait until something listens, and return the local address that reaches it.

        TCPStore itself may take several times its timeout to give up.
        """
        while True:
            try:
                with socket.create_connection(self.server, timeout=min(ADDRESS_S, max(0.1, self.left_s))) as sock:
                    return sock.getsockname()[0]
            except OSError as error:
                if self.left_s < 0:
                    raise TimeoutError(
                        f"{self._where}: nothing listens there within {self._timeout_s:g} s; is the trainer (rank 0)"
                        f" up, and are address and port its own? ({error})"
                    ) from error
                time.sleep(HANDSHAKE_POLL_S)

    def join(self, terms: str) -> None:
        """Wait until all ranks are there, each once, on the same terms."""
        if self.store.add(f"taken/{self.rank}", 1) > 1:
            self.refuse(GroupError, f"rank {self.rank} is taken; do two engines have the same rank_offset?")
        self.meet("joined", terms)

    def meet(self, step: str, value: str) -> None:
        """Wait until all ranks are at this step, with the same value. Raises GroupError or TimeoutError on all."""
        for other, theirs in self._arrivals(step, value):
            if theirs != value:
                says = f"rank {self.rank} has {value}, rank {other} has {theirs}; all ranks need the same"
                self.refuse(GroupError, says)

    def gather(self, step: str, value: str) -> dict[int, str]:
        """Wait until all ranks are at this step, and return what each has. Raises as `meet` does."""
        return {self.rank: value} | dict(self._arrivals(step, value))

    def _arrivals(self, step: str, value: str) -> Iterator[tuple[int, str]]:
        """Each other rank as it comes to this step, and its value."""
        self.store.set(f"{step}/{self.rank}", value)
        missing = set(range(self.world_size)) - {self.rank}
        while missing:
            self._obey(step)
            for other in sorted(missing):
                if self.store.check([f"{step}/{other}"]):
                    missing.discard(other)
                    yield other, _said(self.store.get(f"{step}/{other}"))
            if missing and self.left_s < 0:
                self._expire(f"ranks {sorted(missing)} have not {step}", self.world_size - len(missing))
            if missing:
                time.sleep(HANDSHAKE_POLL_S)

    def during(self, step: str, call: Callable[[], T], give_up: Callable[[str], None]) -> T:
        """What `call` returns or raises, in a thread; `give_up`, with a reason, where the others fail meanwhile.

        Raises as `meet` does; nobody waits for a call that does not return then.
        """
        calling = in_a_thread(call)
        try:
            while not futures.wait([calling], HANDSHAKE_POLL_S).done:
                self.look(step)
        except BaseException as error:
            give_up(first_line(error))
            raise
        return calling.result()

    def look(self, step: str) -> None:
        """Raise where another rank has given up, or the deadline is over before this rank has ended the step."""
        self._obey(step)
        if self.left_s < 0:
            self._expire(f"rank {self.rank} has not {step}, for which it needs the others,")

    def _expire(self, what: str, ranks: float = math.inf) -> NoReturn:
        hint = f"slow ones get longer by {JOIN_TIMEOUT_VARIABLE}, dead ones say why in their logs"
        self.refuse(TimeoutError, f"{what} within {self._timeout_s:g} s; {hint}", ranks)

    def refuse(self, kind: type[Exception], verdict: str, ranks: float = math.inf) -> NoReturn:
        """Raise, on this rank and on all others; `ranks` is how many are there, where that is known.

        The first that refuses is heard: what another rank refuses after that is a consequence.
        """
        said = self.announce(kind, verdict)
        self._leave(said, ranks)

    def announce(self, kind: type[Exception], verdict: str) -> str:
        """Have all others refuse, and return what the first rank to do so has said."""
        said = f"{kind.__name__}: {verdict}"
        with contextlib.suppress(torch.distributed.DistError):
            return _said(self.store.compare_set("refused", "", said))
        return said

    def _obey(self, step: str) -> None:
        if self.store.check(["refused"]):
            here = sum(self.store.check([f"{step}/{rank}"]) for rank in range(self.world_size))
            self._leave(_said(self.store.get("refused")), here)

    def part(self) -> None:
        """All is well: leave once all ranks know. Rank 0 leaves last, since the others read the store it serves."""
        self.meet("finished", "all well")
        self.store.add("left", 1)
        if self.rank == 0:
            self._await_left(self.world_size)  # who is slow now reads on: the store lives as long as the communicator

    def _leave(self, said: str, ranks: float) -> NoReturn:
        kind, _, verdict = said.partition(": ")
        with contextlib.suppress(torch.distributed.DistError):
            self.store.add("left", 1)
            if self.rank == 0:
                self._await_left(ranks if kind == "TimeoutError" else math.inf)
        self.store = None  # gives the port back, whoever keeps the error
        raise (TimeoutError if kind == "TimeoutError" else GroupError)(f"{self._where}: {verdict}")

    def _await_left(self, ranks: float) -> None:
        deadline = time.monotonic() + LINGER_S
        while self.store.add("left", 0) < ranks and time.monotonic() < deadline:
            time.sleep(HANDSHAKE_POLL_S)


def _said(value: bytes) -> str:
    """What another rank has put into the store, whatever it is, as a message can hold it."""
    return value[:SHOWN_BYTES].decode(errors="backslashreplace")


def listens(server: tuple[str, int]) -> bool:
    """Whether rank 0 still serves the rendezvous."""
    try:
        socket.create_connection(server, timeout=PRESENCE_POLL_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # too busy to answer is not gone
        return True
    return True
