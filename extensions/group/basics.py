"""What every part of a group needs."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Protocol, TypeVar

import torch

from extensions.tensors import flat_bytes

T = TypeVar("T")


class GroupError(RuntimeError):
    """The group did not come up as asked, or does not carry data."""


class Communicator(Protocol):
    """What `stateless_init_process_group` returns."""

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float  # how long a broadcast may take

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        """Send `tensor` from rank `src`, or receive into it; contiguous, any dtype, on the communicator's device.

        Raises ValueError for a `src` that is no rank, and GroupError where the group has been given up. On
        CUDA devices the tensor is there once the stream, or `wait`, says so.
        """

    def broadcast_all(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """As `broadcast`, of several tensors in their order, which every rank hands over in one call like this."""

    def wait(self) -> None:
        """Wait until all broadcasts have ended. Raises GroupError where one can't: a rank is gone, or too slow."""

    def abort(self, reason: str) -> None:
        """Give the group up, from any thread: who is inside broadcast() or wait() raises GroupError with `reason`.

        Within 2 s; so does every later broadcast. The other ranks notice that this one has left.
        """

    def close(self) -> None:
        """Give back sockets and device memory; `wait` first, or broadcasts are lost that have not ended.

        The communicator can't be used afterwards.
        """


def in_a_thread(function: Callable[[], T]) -> "futures.Future[T]":
    """What a call returns or raises, in a thread that nobody has to wait for."""
    future: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that torch adds; its type where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


def expect_rank(src: int, world_size: int) -> None:
    """Raise ValueError for a rank that a group does not have."""
    if not 0 <= src < world_size:
        raise ValueError(f"expected src to be a rank of 0..{world_size - 1}, found {src}")


def as_bytes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor's memory as bytes, shared with it. Raises ValueError where it can't be broadcast in place."""
    expect_in_place(tensor, device)
    return flat_bytes(tensor)


def expect_in_place(tensor: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError where a tensor's memory can't be broadcast as it is."""
    if tensor.device != device:
        raise ValueError(f"the communicator is on {device}, the tensor on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError("only contiguous tensors are broadcast in place; call .contiguous() first")
