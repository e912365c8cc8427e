"""The communicator of CPU tensors."""

import contextlib
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch

from extensions.group.basics import GroupError, as_bytes, expect_rank, first_line
from extensions.group.rendezvous import Rendezvous

ANY_ADDRESS = ("0.0.0.0", "::")
GLOO_TIMEOUT_S = 24 * 3600  # gloo's own, never to be reached: the deadlines here are the ones that count


class GlooCommunicator:
    """Broadcasts of CPU tensors.

    gloo waits for its peers without looking at anything else, and nothing that torch offers ends such a wait. The end
    of its connections does, on both sides: this class holds a second handle of each, and ends them to abort.
    """

    def __init__(self, meeting: Rendezvous, device: torch.device) -> None:
        self.rank, self.world_size, self.device = meeting.rank, meeting.world_size, device
        self.timeout_s = max(1.0, meeting.left_s)
        self._lost = ""  # why the group was given up
        before = _descriptors()
        options = torch.distributed.ProcessGroupGloo._Options()
        options._devices = [_device(meeting.local_address)]
        options._timeout = timedelta(seconds=GLOO_TIMEOUT_S)
        own_port = next((port for port in map(_listening_port, _descriptors() - before) if port), 0)
        ports = meeting.gather("begun to connect", str(own_port)).values()
        self._group = meeting.during("connected", lambda: _connect(meeting, options), give_up=lambda reason: None)
        self._connections = _connections(before, ports)
        meeting.meet("connected", "gloo")
        self._store = meeting.store  # rank 0 serves the others through it; last, or who keeps an error keeps the port

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        if self._group is None:
            raise GroupError("this communicator is closed")
        expect_rank(src, self.world_size)
        data = as_bytes(tensor, self.device)  # as bytes: gloo does not know every dtype, and moves them all alike
        options = torch.distributed.BroadcastOptions()
        options.rootRank = src
        self._expect_whole()
        work = self._group.broadcast([data], options)
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            late = f"a broadcast has not ended within {self.timeout_s:g} s"
            self.abort(f"a broadcast failed ({first_line(error)})" if work.is_completed() else late)
            self._expect_whole()

    def broadcast_all(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        for tensor in tensors:
            self.broadcast(tensor, src)

    def _expect_whole(self) -> None:
        if self._lost:
            raise GroupError(f"rank {self.rank}: {self._lost}; make a new group")

    def wait(self) -> None:
        self._expect_whole()  # every broadcast has ended when it returns

    def abort(self, reason: str) -> None:
        self._lost = self._lost or reason
        for connection in self._connections:
            with contextlib.suppress(OSError):  # ended already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._group = self._store = None
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()


def _device(address: str) -> object:
    """gloo's listener, where the rendezvous is: a host's own name may resolve to nothing, or to elsewhere."""
    if address in ANY_ADDRESS:
        return torch.distributed.ProcessGroupGloo.create_default_device()
    return torch.distributed.ProcessGroupGloo.create_device(hostname=address)


def _connect(meeting: Rendezvous, options: object) -> torch.distributed.ProcessGroupGloo:
    store = torch.distributed.PrefixStore("gloo", meeting.client())  # its waits end when rank 0 leaves
    return torch.distributed.ProcessGroupGloo(store, meeting.rank, meeting.world_size, options)


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/dev/fd")}


def _opened(descriptor: int) -> socket.socket | None:
    """A second handle of a socket; None for what is no socket."""
    try:
        copy = os.dup(descriptor)
    except OSError:  # closed meanwhile
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None


def _listening_port(descriptor: int) -> int:
    """The port where a descriptor listens; 0 for every other."""
    found = _opened(descriptor)
    if found is None:
        return 0
    with found:
        inet = found.family in (socket.AF_INET, socket.AF_INET6)
        listens = inet and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return found.getsockname()[1] if listens else 0


def _connections(before: set[int], ports: Iterable[str]) -> list[socket.socket]:
    """Second handles of the group's connections: those opened since, from or to a port where one of its ranks listens.

    Other threads of the process may have opened connections meanwhile.
    """
    found = []
    for one in filter(None, map(_opened, _descriptors() - before)):
        try:
            ends = {str(one.getsockname()[1]), str(one.getpeername()[1])}
        except (OSError, IndexError):  # it listens, or is no connection of the network
            ends = set()
        if ends & (set(ports) - {"0"}):
            found.append(one)
        else:
            one.close()
    return found
