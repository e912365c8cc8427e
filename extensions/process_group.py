"""A communicator between one trainer and the workers of any number of engines.

It leaves torch.distributed's global group alone, since both the trainer and vLLM have one of their own. NCCL moves
tensors of CUDA devices, gloo those of CPUs, behind one `broadcast`. Ranks find each other through a TCPStore that rank
0 serves; what passes through it is text and NCCL's identifier as bytes, and nothing is unpickled.
"""

import secrets
import time
from datetime import timedelta
from typing import Protocol

import torch

HANDSHAKE_POLL_S = 0.02
DEFAULT_TIMEOUT_S = 120.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class GroupError(RuntimeError):
    """The group did not come up as asked, or does not carry data."""


class Communicator(Protocol):
    """What `stateless_init_process_group` returns."""

    rank: int
    world_size: int
    device: torch.device

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        """Send `tensor` from rank `src`, or receive into it; contiguous, any dtype, on the communicator's device."""

    def close(self) -> None:
        """Give back sockets and device memory. The communicator can't be used afterwards."""


def stateless_init_process_group(
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    device: "torch.device | str | int",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Communicator:
    """Join `world_size` ranks at `master_address:master_port`, where rank 0 listens, and return the communicator.

    NCCL where `device` is a CUDA device (an int is a CUDA ordinal), gloo on `"cpu"`. Before it is handed out, every
    rank has named the same world size and backend, and a random value has been broadcast by rank 0 and seen to
    arrive: a communicator that is disabled, or one that "broadcasts" nothing (vllm#57022), never leaves this function.

    Raises ValueError for impossible ranks or sizes, GroupError where the ranks disagree or data does not arrive, and
    TimeoutError where a rank is missing after `timeout_s` seconds. The name and signature are those of vLLM's RLHF
    examples.
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if world_size < 2:
        raise ValueError(f"a trainer and its workers are at least 2 ranks, found world_size={world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
    where = f"rank {rank} of {world_size} at {master_address}:{master_port}"
    store = _open_store(master_address, master_port, rank, timeout_s, where)
    _agree(store, rank, world_size, device.type, timeout_s, where)
    group: Communicator
    if device.type == "cuda":
        group = _NcclCommunicator(store, rank, world_size, device)
    else:
        group = _GlooCommunicator(store, rank, world_size, device, master_address, timeout_s)
    _prove(group, store, where)
    return group


def _open_store(address: str, port: int, rank: int, timeout_s: float, where: str) -> torch.distributed.TCPStore:
    try:
        return torch.distributed.TCPStore(
            address, port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
    except torch.distributed.DistNetworkError as error:
        hint = "is the port taken?" if rank == 0 else "is the trainer (rank 0) up, and are address and port its own?"
        raise GroupError(f"{where}: no rendezvous within {timeout_s:g} s; {hint} ({error})") from error
    except torch.distributed.DistStoreError as error:
        raise TimeoutError(f"{where}: no answer within {timeout_s:g} s ({error})") from error


def _agree(
    store: torch.distributed.TCPStore, rank: int, world_size: int, backend: str, timeout_s: float, where: str
) -> None:
    """Wait until all ranks are there and have named the same world size and device type."""
    mine = f"world_size={world_size} device={backend}"
    if store.add(f"taken/{rank}", 1) > 1:
        raise GroupError(f"{where}: rank {rank} is taken; do two engines have the same rank_offset?")
    store.set(f"joined/{rank}", mine)
    deadline = time.monotonic() + timeout_s
    missing = set(range(world_size)) - {rank}
    while missing:
        if store.check(["refused"]):
            raise GroupError(f"{where}: {store.get('refused').decode()}")
        for other in sorted(missing):
            if not store.check([f"joined/{other}"]):
                continue
            theirs = store.get(f"joined/{other}").decode()
            if theirs != mine:
                verdict = f"rank {rank} has {mine}, rank {other} has {theirs}; all ranks need the same"
                store.set("refused", verdict)
                raise GroupError(f"{where}: {verdict}")
            missing.discard(other)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"{where}: ranks {sorted(missing)} have not joined within {timeout_s:g} s")
        if missing:
            time.sleep(HANDSHAKE_POLL_S)


def _prove(group: Communicator, store: torch.distributed.TCPStore, where: str) -> None:
    """Broadcast a random value and compare it with what the store says was sent."""
    if group.rank == 0:
        store.set("proof", str(secrets.randbits(62) + 1))
    expected = int(store.get("proof"))
    proof = torch.zeros(1, dtype=torch.int64, device=group.device)
    if group.rank == 0:
        proof.fill_(expected)
    group.broadcast(proof, src=0)
    if proof.item() != expected:
        group.close()
        raise GroupError(f"{where}: the first broadcast did not arrive (expected {expected}, found {proof.item()})")


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
        self._group.broadcast([_as_bytes(tensor, self.device)], options).wait()

    def close(self) -> None:
        self._group = None
        self._store = None


class _NcclCommunicator:
    """Broadcasts of CUDA tensors, through vLLM's own binding of NCCL."""

    def __init__(self, store: torch.distributed.TCPStore, rank: int, world_size: int, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self.rank, self.world_size, self.device = rank, world_size, device
        self._store = store
        with torch.cuda.device(device):
            self._comm = PyNcclCommunicator(_plain_group(store, rank, world_size), device=device)
        if self._comm.disabled or not self._comm.available:
            raise GroupError("vLLM's NCCL communicator came up disabled: is NCCL there, and VLLM_DISABLE_PYNCCL unset?")

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        if self._comm is None:
            raise GroupError("this communicator is closed")
        with torch.cuda.device(self.device):
            self._comm.broadcast(
                _as_bytes(tensor, self.device), src=src, stream=stream or torch.cuda.current_stream(self.device)
            )

    def close(self) -> None:
        comm, self._comm, self._store = self._comm, None, None
        if comm is not None and hasattr(comm, "destroy"):  # since vLLM 0.19
            comm.destroy()


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
    return tensor.detach().view(-1).view(torch.uint8)
