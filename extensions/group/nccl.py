"""The communicator of CUDA tensors."""

import ctypes
import functools
import socket
import threading
import time
from collections import deque
from concurrent import futures

import torch

from extensions.group.basics import GroupError, as_bytes, first_line, in_a_thread
from extensions.group.rendezvous import Meeting

WATCH_POLL_S = 0.5
CALL_S = 1.0  # how long an abort waits for a call into NCCL to return
ABORT_S = 5.0  # how long aborting may hold up whoever closes


class NcclCommunicator:
    """Broadcasts of CUDA tensors, through vLLM's own binding of NCCL.

    NCCL waits for a peer for ever, and so does whoever waits for the device. A thread watches the broadcasts: where
    rank 0 is gone, or one takes longer than the timeout, it aborts them all. So does a broadcast that NCCL refuses, as
    over sockets, where it notices itself that a peer is gone: those before it would stay on the device for ever.
    """

    def __init__(self, meeting: Meeting, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self.rank, self.world_size, self.device = rank, world_size, device
        self._store, self._server, self._timeout_s = meeting.store, meeting.server, timeout_s
        with torch.cuda.device(device):
            self._comm = PyNcclCommunicator(plain_group(meeting.store, rank, world_size), device=device)
        if self._comm.disabled or not self._comm.available:
            raise GroupError("vLLM's NCCL communicator came up disabled: is NCCL there, and VLLM_DISABLE_PYNCCL unset?")
        self._begin_watching()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        self._expect_whole()
        data = as_bytes(tensor, self.device)
        with torch.cuda.device(self.device):
            stream, ended = stream or torch.cuda.current_stream(self.device), torch.cuda.Event(blocking=True)
            with self._calling:
                refusal = self._lost or self._refusal(data, src, stream)
            if refusal:
                self._give_up(refusal)
                self._expect_whole()
            ended.record(stream)
        self._under_way.append((time.monotonic(), ended))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)
        self._expect_whole()

    def close(self) -> None:
        self._closed.set()
        self._watcher.join(ABORT_S)
        with self._aborting:
            comm, self._comm, self._store = self._comm, None, None
        if self._lost:
            futures.wait([self._abort], ABORT_S)
        elif hasattr(comm, "destroy"):  # since vLLM 0.19
            comm.destroy()

    def _refusal(self, data: torch.Tensor, src: int, stream: "torch.cuda.Stream") -> str:
        """Hand a broadcast to NCCL. Returns what it says where it refuses, which is empty where it does not."""
        try:
            self._comm.broadcast(data, src=src, stream=stream)
        except RuntimeError as error:  # NCCL's own
            return first_line(error) or "NCCL refused the broadcast"
        return ""

    def _begin_watching(self) -> None:
        self._lost = ""  # why the group was given up
        self._abort: futures.Future[None] | None = None
        self._aborting = threading.Lock()
        self._calling = threading.Lock()  # held while NCCL is called: an abort frees what the call works with
        self._progress_s = 0.0  # when a broadcast was last seen to have ended
        self._under_way: deque[tuple[float, torch.cuda.Event]] = deque()
        self._asked: futures.Future[None] | None = None
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="nccl-watch", daemon=True)
        self._watcher.start()

    def _expect_whole(self) -> None:
        if self._comm is None:
            raise GroupError("this communicator is closed")
        if self._lost:
            with self._aborting:
                futures.wait([self._abort], ABORT_S)  # until then the device may still be waiting
            raise GroupError(f"rank {self.rank}: {self._lost}; the group was aborted, make a new one")

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_POLL_S):
            try:
                trouble = self._trouble()
            except Exception as error:  # nobody would watch any more
                trouble = f"its broadcasts could not be watched: {type(error).__name__}: {first_line(error)}"
            if trouble:
                self._give_up(trouble)
            if self._lost:
                return

    def _give_up(self, reason: str) -> None:
        """End all broadcasts on the device; once, by whoever finds out first."""
        with self._aborting:
            if not self._lost and self._comm is not None:
                self._lost = reason  # first: whoever waits for the device goes on when it is aborted
                self._abort = in_a_thread(functools.partial(self._end, self._comm))

    def _end(self, comm: object) -> None:
        """Abort once no call is in NCCL; after that none comes any more. One that does not return is not waited for."""
        if self._calling.acquire(timeout=CALL_S):
            self._calling.release()
        _abort(comm, self.device)

    def _trouble(self) -> str:
        """Why to give up; empty as long as broadcasts end."""
        if not self._under_way:
            return ""
        self._ask()
        try:
            began_s, _ = self._under_way[0]
        except IndexError:  # they have all ended meanwhile
            return ""
        waited_s = time.monotonic() - max(began_s, self._progress_s)
        if waited_s > self._timeout_s:
            return f"a broadcast has not ended within {self._timeout_s:g} s"
        if self.rank != 0 and waited_s > WATCH_POLL_S and not listens(self._server):
            self._ask()  # rank 0 may leave as soon as its own have ended
            return "rank 0 is gone in the middle of a broadcast" if self._under_way else ""
        return ""

    def _ask(self) -> None:
        """Drop what has ended, as far as the device says so now; an error is no end.

        In a thread: CUDA does not answer while another loads code onto the device, which waits for what runs there
        (seen on an H200). And not by `query()`, which would keep the interpreter meanwhile.
        """
        if self._asked is None or self._asked.done():
            self._asked = in_a_thread(self._drop_ended)
        futures.wait([self._asked], WATCH_POLL_S)

    def _drop_ended(self) -> None:
        with torch.cuda.device(self.device):
            while self._under_way:
                self._under_way[0][1].synchronize()
                self._under_way.popleft()
                self._progress_s = time.monotonic()


def _abort(comm: object, device: torch.device) -> None:
    """ncclCommAbort, which vLLM does not bind before 0.22."""
    with torch.cuda.device(device):
        nccl_abort = comm.nccl.lib.ncclCommAbort
        nccl_abort.argtypes = [ctypes.c_void_p]
        nccl_abort(comm.comm)


def listens(server: tuple[str, int]) -> bool:
    try:
        socket.create_connection(server, timeout=WATCH_POLL_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # too busy to answer is not gone
        return True
    return True


def plain_group(store: torch.distributed.TCPStore, rank: int, world_size: int):
    """vLLM's StatelessProcessGroup, with its one message, NCCL's identifier, as bytes instead of a pickle."""
    from vllm.distributed.utils import StatelessProcessGroup

    class PlainGroup(StatelessProcessGroup):
        def broadcast_obj(self, obj, src):
            if self.rank == src:
                self.store.set("nccl_unique_id", bytes(bytearray(obj.internal)))
                return obj
            received = self.store.get("nccl_unique_id")
            if len(received) != len(obj.internal):
                raise GroupError(f"NCCL's identifier has {len(obj.internal)} bytes, found {len(received)}")
            for index, byte in enumerate(received):
                obj.internal[index] = byte - 256 if byte > 127 else byte
            return obj

    return PlainGroup(rank=rank, world_size=world_size, store=store)
