"""A communicator between one trainer and the workers of any number of engines.

It leaves torch.distributed's global group alone, since both the trainer and vLLM have one of their own. NCCL moves
tensors of CUDA devices, gloo those of CPUs, behind one `broadcast`. Ranks find each other through a TCPStore that rank
0 serves; what passes through it is text and NCCL's identifier as bytes, and nothing is unpickled.
"""

import math
import os
import secrets

import torch

from extensions.group.basics import Communicator, GroupError, first_line
from extensions.group.gloo import GlooCommunicator
from extensions.group.nccl import NcclCommunicator
from extensions.group.rendezvous import LINGER_S, Meeting

__all__ = ["LINGER_S", "Communicator", "GroupError", "stateless_init_process_group"]

DEFAULT_TIMEOUT_S = 120.0
TIMEOUT_VARIABLE = "WEIGHT_UPDATE_TIMEOUT_S"


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
    meeting = Meeting(master_address, master_port, rank, world_size, timeout_s)
    try:
        meeting.join(f"world_size={world_size} device={device.type}")
        if device.type == "cuda":
            group: Communicator = NcclCommunicator(meeting, rank, world_size, device, timeout_s)
        else:
            group = GlooCommunicator(meeting.store, rank, world_size, device, master_address, timeout_s)
        _prove(group, meeting)
        meeting.part()
    except RuntimeError as error:  # GroupError too, or the backend's, or the store's, whose server goes with rank 0
        if meeting.store is None:
            raise
        meeting.refuse(GroupError, f"rank {rank} could not make the group: {first_line(error)}")
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


def _prove(group: Communicator, meeting: Meeting) -> None:
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
