"""The communicator of CUDA tensors."""

import contextlib
import ctypes
import functools
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent import futures

import torch

from extensions.group.basics import GroupError, expect_in_place, expect_rank, first_line, in_a_thread
from extensions.group.nccl_binding import ID_BYTES, Comm, Library, NcclError
from extensions.group.rendezvous import HANDSHAKE_POLL_S, Rendezvous, listens

WATCH_POLL_S = 0.5
SPIN_S = 0.005  # how long to ask NCCL without a pause: most calls end in less than a pause takes
SETTLE_POLL_S = 0.001
CALL_S = 1.0  # how long an abort waits for a call into NCCL to return
KERNELS_S = 30.0  # how long loading NCCL's code may take
ABORT_S = 5.0  # how long aborting may hold up whoever closes


class NcclCommunicator:
    """Broadcasts of CUDA tensors.

    NCCL waits for a peer for ever, and so does whoever waits for the device. A thread watches the broadcasts: where
    rank 0 is gone, or one takes longer than the timeout, it aborts them all. So does a broadcast that NCCL refuses, as
    over sockets, where it notices itself that a peer is gone: those before it would stay on the device for ever.
    """

    def __init__(self, meeting: Rendezvous, device: torch.device) -> None:
        self.rank, self.world_size, self.device = meeting.rank, meeting.world_size, device
        self.timeout_s = max(1.0, meeting.left_s)
        self._server = meeting.server
        self._comm: Comm | None = connect(load_library(), meeting, device)
        self._begin_watching()
        self._store = meeting.store  # rank 0 serves the others through it; last, or who keeps an error keeps the port

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        self._broadcast([tensor], src, stream or torch.cuda.current_stream(self.device))

    def broadcast_all(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        self._broadcast(tensors, src, torch.cuda.current_stream(self.device))

    def _broadcast(self, tensors: Sequence[torch.Tensor], src: int, stream: "torch.cuda.Stream") -> None:
        self._expect_whole()
        expect_rank(src, self.world_size)
        for tensor in tensors:
            expect_in_place(tensor, self.device)
        places = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        ended = torch.cuda.Event(blocking=True)
        with self._calling:
            refusal = self._lost or self._refusal(places, src, stream)
        if refusal:
            self._give_up(refusal)
            self._expect_whole()
        ended.record(stream)
        self._under_way.append((time.monotonic(), ended))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)
        self._expect_whole()

    def abort(self, reason: str) -> None:
        self._give_up(reason)

    def close(self) -> None:
        self._closed.set()
        self._watcher.join(ABORT_S)
        with self._aborting:
            comm, self._comm, self._store = self._comm, None, None
        if comm is not None and not self._lost:
            self._abort = in_a_thread(functools.partial(self._end, comm))
        if self._abort is not None:
            futures.wait([self._abort], ABORT_S)

    def _refusal(self, places: Sequence[tuple[int, int]], src: int, stream: "torch.cuda.Stream") -> str:
        """Hand broadcasts to NCCL, and say why they were not taken; empty where they were."""
        began_s = time.monotonic()
        try:
            if len(places) == 1:
                settled = self._comm.broadcast(*places[0], src, stream.cuda_stream)
            else:
                settled = self._comm.broadcast_all(places, src, stream.cuda_stream)
            while not settled and not self._lost:
                waited_s = time.monotonic() - began_s
                if waited_s > self.timeout_s:
                    return f"NCCL has not taken a broadcast within {self.timeout_s:g} s"
                time.sleep(0 if waited_s < SPIN_S else SETTLE_POLL_S)
                settled = self._comm.settled()
        except NcclError as error:
            return first_line(error)
        return "" if settled else self._lost

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

    def _end(self, comm: Comm) -> None:
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
        if waited_s > self.timeout_s:
            return f"a broadcast has not ended within {self.timeout_s:g} s"
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


def connect(library: Library, meeting: Rendezvous, device: torch.device) -> Comm:
    """Join the ranks by NCCL. Raises as `meeting` does; what has begun is aborted then, and nobody is left inside."""
    told = meeting.gather("begun to connect", library.unique_id().hex() if meeting.rank == 0 else "")
    with torch.cuda.device(device):
        comm = Comm(library, meeting.world_size, meeting.rank, identifier(told[0]))
    try:
        _settle(comm, meeting)
        with torch.cuda.device(device):
            comm.split()
        _settle(comm, meeting)
        meeting.meet("connected", "NCCL")
    except BaseException:
        futures.wait([in_a_thread(functools.partial(_abort, comm, device))], ABORT_S)
        raise
    return comm


def _settle(comm: Comm, meeting: Rendezvous) -> None:
    while not comm.settled():
        meeting.look("connected")
        time.sleep(HANDSHAKE_POLL_S)


def identifier(told: str) -> bytes:
    """What rank 0 has told, as NCCL's identifier: nothing but bytes, and as many as there have to be."""
    try:
        found = bytes.fromhex(told)
    except ValueError:
        found = b""
    if len(found) != ID_BYTES:
        raise GroupError(f"NCCL's identifier is {ID_BYTES} bytes in hexadecimal digits, found {told!r:.80}")
    return found


@functools.cache
def load_library() -> Library:
    """NCCL, found as vLLM finds it. Raises GroupError where it is not there."""
    try:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        name = NCCLLibrary().lib._name
    except (ImportError, OSError, ValueError) as error:
        hint = "is it installed with vLLM, or VLLM_NCCL_SO_PATH set?"
        raise GroupError(f"vLLM finds no NCCL; {hint} ({first_line(error)})") from error
    return Library(ctypes.CDLL(name))  # a handle of its own: vLLM declares the same functions in its own way


@functools.cache
def load_kernels(device: torch.device) -> None:
    """Have NCCL's code on a device, which takes a second or two: it comes with the first group, here one of one rank.

    What NCCL refuses here it refuses when a group is joined, and there it is said.
    """
    library = load_library()
    deadline = time.monotonic() + KERNELS_S
    with contextlib.suppress(NcclError), torch.cuda.device(device):
        comm = Comm(library, 1, 0, library.unique_id())
        with contextlib.suppress(NcclError):
            while not comm.settled() and time.monotonic() < deadline:
                time.sleep(HANDSHAKE_POLL_S)
        futures.wait([in_a_thread(functools.partial(_abort, comm, device))], ABORT_S)


def _abort(comm: Comm, device: torch.device) -> None:
    with torch.cuda.device(device):
        comm.abort()
