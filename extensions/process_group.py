"""A communicator between one trainer and the workers of any number of engines.

It leaves torch.distributed's global group alone, since both the trainer and vLLM have one of their own. NCCL moves
tensors of CUDA devices, gloo those of CPUs, behind one `broadcast`. Ranks find each other through a TCPStore that rank
0 serves; what passes through it is text and NCCL's identifier as bytes, and nothing is unpickled.
"""

import contextlib
import ctypes
import functools
import math
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from datetime import timedelta
from typing import NoReturn, Protocol, TypeVar

import torch

from extensions.dtypes import flat_bytes

HANDSHAKE_POLL_S = 0.02
SHOWN_BYTES = 1000
WATCH_POLL_S = 0.5
CALL_S = 1.0  # how long an abort waits for a call into NCCL to return
ABORT_S = 5.0  # how long aborting may hold up whoever closes
LINGER_S = 2.0  # how long rank 0 stays after a refusal, for the others to hear of it
DEFAULT_TIMEOUT_S = 120.0
TIMEOUT_VARIABLE = "WEIGHT_UPDATE_TIMEOUT_S"
T = TypeVar("T")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class GroupError(RuntimeError):
    """The group did not come up as asked, or does not carry data."""


class Communicator(Protocol):
    """What `stateless_init_process_group` returns."""

    rank: int
    world_size: int
    device: torch.device

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        """Send `tensor` from rank `src`, or receive into it; contiguous, any dtype, on the communicator's device.

        Raises GroupError where the group has been given up. On CUDA devices the tensor is there once the stream, or
        `wait`, says so.
        """

    def wait(self) -> None:
        """Wait until all broadcasts have ended. Raises GroupError where one can't: a rank is gone, or too slow."""

    def close(self) -> None:
        """Give back sockets and device memory. The communicator can't be used afterwards."""


def stateless_init_process_group(
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    device: "torch.device | str | int",
    timeout_s: float | None = None,
) -> Communicator:
    """Join `world_size` ranks at `master_address:master_port`, where rank 0 listens, and return the communicator.

    NCCL where `device` is a CUDA device (an int is a CUDA ordinal), gloo on `"cpu"`. Before it is handed out, every
    rank has named the same world size and backend, and a random value has been broadcast by rank 0 and seen to
    arrive: a communicator that is disabled, or one that "broadcasts" nothing (vllm#57022), never leaves this function.

    `timeout_s` is WEIGHT_UPDATE_TIMEOUT_S of the environment where it is not given, and 120 where that is not set.
    A broadcast whose peer died or takes longer than `timeout_s` ends in GroupError on the ranks that are left, where
    NCCL itself would wait for ever.

    Raises ValueError for impossible ranks or sizes, GroupError where the ranks disagree or data does not arrive, and
    TimeoutError where a rank is missing after `timeout_s` seconds: on every rank that is there. The name and signature
    are those of vLLM's RLHF examples.
    """
    timeout_s = _timeout_s() if timeout_s is None else timeout_s
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if world_size < 2:
        raise ValueError(f"a trainer and its workers are at least 2 ranks, found world_size={world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
    meeting = _Meeting(master_address, master_port, rank, world_size, timeout_s)
    try:
        meeting.join(f"world_size={world_size} device={device.type}")
        if device.type == "cuda":
            group: Communicator = _NcclCommunicator(meeting, rank, world_size, device, timeout_s)
        else:
            group = _GlooCommunicator(meeting.store, rank, world_size, device, master_address, timeout_s)
        _prove(group, meeting)
        meeting.part()
    except RuntimeError as error:  # GroupError too, or the backend's, or the store's, whose server goes with rank 0
        if meeting.store is None:
            raise
        meeting.refuse(GroupError, f"rank {rank} could not make the group: {_first_line(error)}")
    return group


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected seconds, found {text!r}")
    return seconds


def _prove(group: Communicator, meeting: "_Meeting") -> None:
    """Broadcast a random value, and have all ranks compare what they have then: on the sender it is always right."""
    proof = torch.zeros(1, dtype=torch.int64, device=group.device)
    if group.rank == 0:
        proof.fill_(secrets.randbits(62) + 1)
    try:
        group.broadcast(proof, src=0)
        meeting.meet("proved", f"{proof.item()} after the first broadcast")
    except BaseException:
        group.close()
        raise


class _Meeting:
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
        opening = _in_a_thread(self._open_store)  # TCPStore waits for ever where something else listens, and is silent
        try:
            self.store = opening.result(max(1.0, self._deadline - time.monotonic()))
        except TimeoutError:
            raise GroupError(f"{self._where}: what listens there does not answer as rank 0 would") from None
        except torch.distributed.DistError as error:
            hint = "is the port taken?" if rank == 0 else "are address and port the trainer's (rank 0's) own?"
            raise GroupError(f"{self._where}: no rendezvous; {hint} ({_first_line(error)})") from error

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


def _in_a_thread(function: Callable[[], T]) -> "futures.Future[T]":
    """What a call returns or raises, in a thread that nobody has to wait for."""
    future: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _said(value: bytes) -> str:
    """What another rank has put into the store, whatever it is, as a message can hold it."""
    return value[:SHOWN_BYTES].decode(errors="backslashreplace")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class _GlooCommunicator:
    """Broadcasts of CPU tensors."""

    def __init__(
        self,
        store: torch.distributed.TCPStore,
        rank: int,
        world_size: int,
        device: torch.device,
        address: str,
        timeout_s: float,
    ) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo

        self.rank, self.world_size, self.device = rank, world_size, device
        self._store = store  # rank 0 serves the others through it
        options = ProcessGroupGloo._Options()
        # A host whose own name resolves to nothing would fail where all ranks are on it.
        local = address in LOOPBACK
        options._devices = [
            ProcessGroupGloo.create_device(hostname="127.0.0.1") if local else ProcessGroupGloo.create_default_device()
        ]
        options._timeout = timedelta(seconds=timeout_s)
        self._group: ProcessGroupGloo | None = ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, options)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        if self._group is None:
            raise GroupError("this communicator is closed")
        options = torch.distributed.BroadcastOptions()
        options.rootRank = src
        # As bytes: gloo does not know every dtype, and moves them all alike.
        try:
            self._group.broadcast([_as_bytes(tensor, self.device)], options).wait()
        except RuntimeError as error:
            raise GroupError(f"rank {self.rank}: the broadcast was given up ({_first_line(error)})") from error

    def wait(self) -> None:
        pass  # every broadcast has ended when it returns

    def close(self) -> None:
        self._group = None
        self._store = None


class _NcclCommunicator:
    """Broadcasts of CUDA tensors, through vLLM's own binding of NCCL.

    NCCL waits for a peer for ever, and so does whoever waits for the device. A thread watches the broadcasts: where
    rank 0 is gone, or one takes longer than the timeout, it aborts them all. So does a broadcast that NCCL refuses, as
    over sockets, where it notices itself that a peer is gone: those before it would stay on the device for ever.
    """

    def __init__(self, meeting: "_Meeting", rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self.rank, self.world_size, self.device = rank, world_size, device
        self._store, self._server, self._timeout_s = meeting.store, meeting.server, timeout_s
        with torch.cuda.device(device):
            self._comm = PyNcclCommunicator(_plain_group(meeting.store, rank, world_size), device=device)
        if self._comm.disabled or not self._comm.available:
            raise GroupError("vLLM's NCCL communicator came up disabled: is NCCL there, and VLLM_DISABLE_PYNCCL unset?")
        self._begin_watching()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        self._expect_whole()
        data = _as_bytes(tensor, self.device)
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
            return _first_line(error) or "NCCL refused the broadcast"
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
                trouble = f"its broadcasts could not be watched: {type(error).__name__}: {_first_line(error)}"
            if trouble:
                self._give_up(trouble)
            if self._lost:
                return

    def _give_up(self, reason: str) -> None:
        """End all broadcasts on the device; once, by whoever finds out first."""
        with self._aborting:
            if not self._lost and self._comm is not None:
                self._lost = reason  # first: whoever waits for the device goes on when it is aborted
                self._abort = _in_a_thread(functools.partial(self._end, self._comm))

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
        if self.rank != 0 and waited_s > WATCH_POLL_S and not _listens(self._server):
            self._ask()  # rank 0 may leave as soon as its own have ended
            return "rank 0 is gone in the middle of a broadcast" if self._under_way else ""
        return ""

    def _ask(self) -> None:
        """Drop what has ended, as far as the device says so now; an error is no end.

        In a thread: CUDA does not answer while another loads code onto the device, which waits for what runs there
        (seen on an H200). And not by `query()`, which would keep the interpreter meanwhile.
        """
        if self._asked is None or self._asked.done():
            self._asked = _in_a_thread(self._drop_ended)
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


def _listens(server: tuple[str, int]) -> bool:
    try:
        socket.create_connection(server, timeout=WATCH_POLL_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # too busy to answer is not gone
        return True
    return True


def _plain_group(store: torch.distributed.TCPStore, rank: int, world_size: int):
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


def _as_bytes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device != device:
        raise ValueError(f"the communicator is on {device}, the tensor on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError("only contiguous tensors are broadcast in place; call .contiguous() first")
    return flat_bytes(tensor)
