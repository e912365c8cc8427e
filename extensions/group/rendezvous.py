"""Where the ranks of a group find each other."""

import contextlib
import math
import socket
import time
from datetime import timedelta
from typing import NoReturn

import torch

from extensions.group.basics import GroupError, first_line, in_a_thread

HANDSHAKE_POLL_S = 0.02
SHOWN_BYTES = 1000
LINGER_S = 2.0  # how long rank 0 stays after a refusal, for the others to hear of it


class Meeting:
    """Where ranks find each other: a store of text that rank 0 serves. No rank goes on, or fails, without the others.

    All waits together end `timeout_s` after the meeting began.
    """

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        self._address, self._port, self._rank, self._world_size = address, port, rank, world_size
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self.server = (address, port)
        self._where = f"rank {rank} of {world_size} at {address}:{port}"
        self.store: torch.distributed.TCPStore | None = None  # None once this rank has left
        if rank != 0:
            self._await_server()
        opening = in_a_thread(self._open_store)  # TCPStore waits for ever where something else listens, and is silent
        try:
            self.store = opening.result(max(1.0, self._deadline - time.monotonic()))
        except TimeoutError:
            raise GroupError(f"{self._where}: what listens there does not answer as rank 0 would") from None
        except torch.distributed.DistError as error:
            hint = "is the port taken?" if rank == 0 else "are address and port the trainer's (rank 0's) own?"
            raise GroupError(f"{self._where}: no rendezvous; {hint} ({first_line(error)})") from error

    def _open_store(self) -> torch.distributed.TCPStore:
        timeout = timedelta(seconds=self._timeout_s)
        return torch.distributed.TCPStore(
            self._address, self._port, is_master=self._rank == 0, wait_for_workers=False, timeout=timeout
        )

    def _await_server(self) -> None:
        """Wait until something listens: TCPStore itself may take several times its timeout to give up."""
        while True:
            try:
                left = max(0.1, self._deadline - time.monotonic())
                socket.create_connection((self._address, self._port), timeout=left).close()
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise TimeoutError(
                        f"{self._where}: nothing listens there within {self._timeout_s:g} s; is the trainer (rank 0)"
                        f" up, and are address and port its own? ({error})"
                    ) from error
                time.sleep(HANDSHAKE_POLL_S)
            else:
                return

    def join(self, terms: str) -> None:
        """Wait until all ranks are there, each once, on the same terms."""
        if self.store.add(f"taken/{self._rank}", 1) > 1:
            self.refuse(GroupError, f"rank {self._rank} is taken; do two engines have the same rank_offset?")
        self.meet("joined", terms)

    def meet(self, step: str, value: str) -> None:
        """Wait until all ranks are at this step, with the same value. Raises GroupError or TimeoutError on all."""
        self.store.set(f"{step}/{self._rank}", value)
        missing = set(range(self._world_size)) - {self._rank}
        while missing:
            if self.store.check(["refused"]):
                kind, _, verdict = _said(self.store.get("refused")).partition(": ")
                if kind != "TimeoutError":
                    self._leave(GroupError, verdict)
                absent = [other for other in missing if not self.store.check([f"{step}/{other}"])]
                self._leave(TimeoutError, verdict, self._world_size - len(absent))
            for other in sorted(missing):
                if not self.store.check([f"{step}/{other}"]):
                    continue
                theirs = _said(self.store.get(f"{step}/{other}"))
                if theirs != value:
                    says = f"rank {self._rank} has {value}, rank {other} has {theirs}; all ranks need the same"
                    self.refuse(GroupError, says)
                missing.discard(other)
            if missing and time.monotonic() > self._deadline:
                says = f"ranks {sorted(missing)} have not {step} within {self._timeout_s:g} s"
                self.refuse(TimeoutError, says, self._world_size - len(missing))
            if missing:
                time.sleep(HANDSHAKE_POLL_S)

    def refuse(self, kind: type[Exception], verdict: str, ranks: float = math.inf) -> NoReturn:
        """Raise, on this rank and on all others; `ranks` is how many are there, where that is known."""
        with contextlib.suppress(torch.distributed.DistError):
            self.store.set("refused", f"{kind.__name__}: {verdict}")
        self._leave(kind, verdict, ranks)

    def part(self) -> None:
        """All is well: leave, rank 0 last, since the others read the store that it serves."""
        if self._rank != 0:
            self.store.add("left", 1)
        elif not self._await_left(self._world_size - 1, self._deadline):
            self.refuse(TimeoutError, f"not all ranks have left the rendezvous within {self._timeout_s:g} s")

    def _leave(self, kind: type[Exception], verdict: str, ranks: float = math.inf) -> NoReturn:
        """Raise; on rank 0 once the others have left or had time to."""
        with contextlib.suppress(torch.distributed.DistError):
            self.store.add("left", 1)
            if self._rank == 0:
                self._await_left(ranks, time.monotonic() + LINGER_S)
        self.store = None  # gives the port back, whoever keeps the error
        raise kind(f"{self._where}: {verdict}")

    def _await_left(self, ranks: float, deadline: float) -> bool:
        while self.store.add("left", 0) < ranks:
            if time.monotonic() > deadline:
                return False
            time.sleep(HANDSHAKE_POLL_S)
        return True


def _said(value: bytes) -> str:
    """What another rank has put into the store, whatever it is, as a message can hold it."""
    return value[:SHOWN_BYTES].decode(errors="backslashreplace")
