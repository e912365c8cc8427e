"""A communicator between one trainer and the workers of any number of engines.

It leaves torch.distributed's global group alone, since both the trainer and vLLM have one of their own. NCCL moves
tensors of CUDA devices, gloo those of CPUs, behind one `broadcast`. Ranks find each other through a TCPStore that rank
0 serves; what passes through it is text, and nothing is unpickled.
"""

import math
import os
import secrets

import torch

from extensions.group.basics import Communicator, GroupError, first_line
from extensions.group.gloo import GlooCommunicator
from extensions.group.nccl import NcclCommunicator, load_kernels, load_library
from extensions.group.rendezvous import JOIN_TIMEOUT_VARIABLE, LINGER_S, Rendezvous

__all__ = ["LINGER_S", "Communicator", "GroupError", "prepare", "stateless_init_process_group"]

DEFAULT_TIMEOUT_S = 120.0
MAX_PORT = 65535
TIMEOUT_VARIABLE = "WEIGHT_UPDATE_TIMEOUT_S"


def stateless_init_process_group(
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    device: "torch.device | str | int",
    timeout_s: float | None = None,
    join_timeout_s: float | None = None,
) -> Communicator:
    """Join `world_size` ranks at `master_address:master_port`, where rank 0 listens, and return the communicator.

    NCCL where `device` is a CUDA device (an int is a CUDA ordinal), gloo on `"cpu"`. Before it is handed out, every
    rank has named the same world size and backend, and a random value has been broadcast by rank 0 and seen to
    arrive: a communicator that is disabled, or one that "broadcasts" nothing (vllm#57022), never leaves this function.

    Rank 0 listens at `master_address` alone, which is an address of its host that the others reach.

    `join_timeout_s` is how long joining may take, once this process is prepared (see `prepare`); `timeout_s` how long
    a broadcast may take afterwards. They are WEIGHT_UPDATE_JOIN_TIMEOUT_S and WEIGHT_UPDATE_TIMEOUT_S of the
    environment where they are not given, and 120 where those are not set. A broadcast whose peer died or takes longer
    ends in GroupError on the ranks that are left, where NCCL itself would wait for ever.

    Raises ValueError for impossible ranks, sizes, ports or timeouts, GroupError where the ranks disagree, one of them
    fails, or data does not arrive, and TimeoutError where a rank is missing or slow after `join_timeout_s`: on every
    rank that is there. The name and signature are those of vLLM's RLHF examples.
    """
    timeout_s = _seconds(TIMEOUT_VARIABLE) if timeout_s is None else timeout_s
    join_timeout_s = _seconds(JOIN_TIMEOUT_VARIABLE) if join_timeout_s is None else join_timeout_s
    device = _whole(device)
    for name, seconds in (("timeout_s", timeout_s), ("join_timeout_s", join_timeout_s)):
        if not 0 < seconds < math.inf:
            raise ValueError(f"{name}: expected seconds, more than 0 and finite, found {seconds}")
    if not 1 <= master_port <= MAX_PORT:
        raise ValueError(f"expected a port of 1..{MAX_PORT} that rank 0 listens at, found {master_port}")
    if world_size < 2:
        raise ValueError(f"a trainer and its workers are at least 2 ranks, found world_size={world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
    _prepare(device)
    meeting = Rendezvous(master_address, master_port, rank, world_size, join_timeout_s)
    group: Communicator | None = None
    try:
        meeting.join(f"world_size={world_size} device={device.type}")
        group = (NcclCommunicator if device.type == "cuda" else GlooCommunicator)(meeting, device)
        _prove(group, meeting)
        meeting.part()
    except BaseException as error:
        _give_up(group, meeting, error)
        raise
    group.timeout_s = timeout_s
    return group


def prepare(device: "torch.device | str | int") -> None:
    """Have what a group on `device` needs in this process: NCCL and its kernels, vLLM's import of it, a context.

    In a fresh process that takes 9 to 27 s on a GPU host. `stateless_init_process_group` does it first, before its
    deadline begins, all but the kernels, which come with the group; a trainer that does it while it starts keeps nobody
    waiting. Raises GroupError without NCCL.
    """
    device = _whole(device)
    _prepare(device)
    if device.type == "cuda":
        load_kernels(device)


def _prepare(device: torch.device) -> None:
    if device.type == "cuda":
        load_library()
        torch.zeros(1, device=device)


def _whole(device: "torch.device | str | int") -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _seconds(variable: str) -> float:
    text = os.environ.get(variable, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{variable}: expected seconds, found {text!r}")
    return seconds


def _prove(group: Communicator, meeting: Rendezvous) -> None:
    """Broadcast a random value, and have all ranks compare what they have then: on the sender it is always right."""
    proof = torch.zeros(1, dtype=torch.int64, device=group.device)
    if group.rank == 0:
        proof.fill_(secrets.randbits(62) + 1)

    def broadcast() -> int:
        group.broadcast(proof, src=0)
        group.wait()
        return proof.item()

    arrived = meeting.during("seen the first broadcast", broadcast, group.abort)
    meeting.meet("seen the first broadcast", f"{arrived} after the first broadcast")


def _give_up(group: Communicator | None, meeting: Rendezvous, error: BaseException) -> None:
    """End what there is of a group, and have all ranks raise what this one does."""
    verdict = f"rank {meeting.rank} could not make the group: {first_line(error)}"
    if isinstance(error, torch.distributed.DistError) and meeting.rank != 0:
        verdict = f"rank 0, which serves the rendezvous, is gone ({first_line(error)})"
    if meeting.store is not None and not isinstance(error, Exception):  # an interrupt, which goes on as it is
        meeting.announce(GroupError, verdict)
    try:
        if meeting.store is not None and isinstance(error, Exception):
            meeting.refuse(GroupError, verdict)
    finally:
        meeting.store = None
        if group is not None:
            group.abort(verdict)
            group.close()
