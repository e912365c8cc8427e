"""Objects that the selftests of the extensions put into processes: the ranks of a group."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from extensions import group
from extensions.group import gloo, nccl, nccl_binding, stateless_init_process_group
from suite.processes.call import Process
from suite.processes.local import LocalLauncher

ADDRESS = "127.0.0.1"
APART_S = 20.0  # how long a fork may take to join
EXTENTS = ((), (0,), (0, 3), (1,), (3, 5), (1, 1))


def seeded(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits that the dtype may have, the same for the same seed."""
    nbytes = torch.empty(shape, dtype=torch.uint8).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (bits % 2 if dtype == torch.bool else bits).view(dtype).view(shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtypes, shapes and every bit are equal: NaN is NaN."""
    same_form = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_form and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@contextlib.contextmanager
def started(directory: Path, count: int) -> Iterator[list[Process]]:
    """Processes that are up, each of which can join a group as a Rank."""
    with LocalLauncher(directory / "logs") as launcher:
        processes = [launcher.start(f"rank{rank}", f"{__name__}:Rank") for rank in range(count)]
        for process in processes:
            process.ready(60)
        yield processes


class Rank:
    """One rank of a group, or of none."""

    def __init__(self) -> None:
        self._group: group.Communicator | None = None
        self._aside: group.Communicator | None = None

    def prepare(self, device: str) -> None:
        """Have ready what a group needs."""
        group.prepare(device)

    def join(
        self,
        rank: int,
        world_size: int,
        port: int,
        join_timeout_s: float = 10,
        fake: str | None = None,
        timeout_s: float = 10,
        slip: "tuple[str, str, float] | None" = None,
        device: str = "cpu",
        address: str = ADDRESS,
    ) -> float:
        """Join and return the seconds that it took; an error says them too.

        `fake` is one of `_fakes`. `slip` is a step at which this rank slips, how (see `slipping`), and seconds.
        """
        original = group.GlooCommunicator
        group.prepare(device)
        started = time.monotonic()
        try:
            group.GlooCommunicator = _fakes(original)[fake]
            with slipping(*(slip or ("", "", 0))):
                self._group = stateless_init_process_group(
                    address, port, rank, world_size, device, timeout_s, join_timeout_s
                )
        except Exception as error:
            error.args = (f"{error} (after {time.monotonic() - started:.2f} s)",)
            raise
        finally:
            group.GlooCommunicator = original
        return time.monotonic() - started

    def join_apart(self, *args: object, **kwargs: object) -> int:
        """Join in a fork of this process, which has never been in a group, and return the signal that ended it."""
        pid = os.fork()
        if pid == 0:
            try:
                self.join(*args, **kwargs)
            finally:
                os._exit(0)
        deadline = time.monotonic() + APART_S
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)
        return os.WTERMSIG(ended[1])

    def broadcast(self, dtype: str, src: int = 0) -> list[bool]:
        """Send seeded tensors, or receive them into others; for each shape, whether they are there now."""
        arrived = []
        for seed, shape in enumerate(EXTENTS):
            wanted = seeded(getattr(torch, dtype), shape, seed)
            tensor = wanted.clone() if self._group.rank == src else seeded(wanted.dtype, shape, seed + 100)
            tensor = tensor.to(self._group.device)
            if shape == (1, 1):
                tensor = tensor.as_strided(shape, (7, 5))  # contiguous: these strides mean nothing
            self._group.broadcast(tensor, src=src)
            self._group.wait()
            arrived.append(same_bits(tensor.cpu(), wanted))
        return arrived

    def broadcast_wrong(self, what: str) -> None:
        """Try to send what can't be sent in place."""
        tensors = {"strided": torch.ones(4, 4).t(), "elsewhere": torch.ones(4, device="meta")}
        self._group.broadcast(tensors[what], src=0)

    def broadcast_aborted(self, abort_after_s: float, nbytes: int = 1 << 26) -> tuple[str, float]:
        """Send what nobody takes, abort from another thread, and return the error and the seconds from one to other."""
        aborted_s: list[float] = []

        def abort() -> None:
            aborted_s.append(time.monotonic())
            self._group.abort("the test says so")

        timer = threading.Timer(abort_after_s, abort)
        timer.start()
        error = self.broadcast_failing(nbytes)
        timer.join()
        return error, time.monotonic() - aborted_s[0]

    def broadcast_failing(self, nbytes: int = 1 << 26) -> str:
        """Send bytes, or receive them, from rank 0, which fails; the error."""
        try:
            self._group.broadcast(torch.zeros(nbytes, dtype=torch.uint8, device=self._group.device), src=0)
            self._group.wait()
        except group.GroupError as error:
            return str(error)
        return "no error"

    def compare_with_vllm(self, rank: int, port: int, nbytes: int, count: int) -> tuple[float, float] | None:
        """The seconds of `count` broadcasts, by this group and by vLLM's own communicator; None without that one."""
        try:
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
            from vllm.distributed.utils import StatelessProcessGroup
        except ImportError:
            return None
        theirs = PyNcclCommunicator(StatelessProcessGroup.create(ADDRESS, port, rank, 2), self._group.device)
        if theirs.disabled:
            return None
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self._group.device)
        rounds = [[self._seconds(one, tensor, count) for one in (self._group, theirs)] for _ in range(4)]
        return tuple(map(min, zip(*rounds, strict=True)))

    def _seconds(self, communicator: "group.Communicator", tensor: torch.Tensor, count: int) -> float:
        torch.cuda.synchronize(tensor.device)
        began_s = time.monotonic()
        for _ in range(count):
            communicator.broadcast(tensor, src=0)
        torch.cuda.synchronize(tensor.device)
        return time.monotonic() - began_s

    def swap_groups(self) -> None:
        """Use the group that was put aside, and put this one there."""
        self._group, self._aside = self._aside, self._group

    def threads(self) -> int:
        """How many threads this process has, torch's included."""
        return len(os.listdir("/proc/self/task"))

    def close(self) -> None:
        if self._group is not None:
            self._group.close()

    def close_and_broadcast(self) -> None:
        """Use a communicator that is closed."""
        self.close()
        self._group.broadcast(torch.ones(1), src=0)

    def default_group(self) -> bool:
        """Whether torch.distributed has its global group."""
        return torch.distributed.is_initialized()

    def open_default_group(self, rank: int, world_size: int, port: int) -> None:
        torch.distributed.init_process_group("gloo", f"tcp://{ADDRESS}:{port}", rank=rank, world_size=world_size)

    def sum_over_default_group(self) -> float:
        """1 from each rank of torch.distributed's global group."""
        one = torch.ones(1)
        torch.distributed.all_reduce(one)
        return one.item()

    def close_default_group(self) -> None:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def slipping(step: str, how: str, seconds: float) -> Iterator[None]:
    """Have this process be slow, raise, or be killed before a step of the join; "" for none.

    The steps are "arrived", "taken" and what a Rendezvous calls its own. They are also those in which the others do
    not wait there: "first broadcast" and, over NCCL, "NCCL", just before it is asked to join, and "split".
    """

    def before(method: Callable, step_of: Callable[..., str]) -> Callable:
        def slip(self: object, *args: object, **kwargs: object) -> object:
            if step_of(*args) == step:
                time.sleep(seconds)
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "raises":
                    raise ValueError("on purpose")
            return method(self, *args, **kwargs)

        return slip

    with pytest.MonkeyPatch.context() as patches:
        for owner, name, step_of in (
            (group.Rendezvous, "__init__", lambda *_: "arrived"),
            (group.Rendezvous, "join", lambda *_: "taken"),
            (group.Rendezvous, "meet", lambda *args: args[0]),
            (group.Rendezvous, "gather", lambda *args: args[0]),
            (nccl_binding.Comm, "__init__", lambda *_: "NCCL"),
            (nccl_binding.Comm, "split", lambda *_: "split"),
            (gloo.GlooCommunicator, "broadcast", lambda *_: "first broadcast"),
            (nccl.NcclCommunicator, "broadcast", lambda *_: "first broadcast"),
        ):
            patches.setattr(owner, name, before(getattr(owner, name), step_of))
        yield


def _fakes(original: type) -> dict[str | None, type]:
    """Communicators that are not what they seem."""

    class Silent(original):
        def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
            pass

    class Failing(original):
        def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
            raise RuntimeError("no such wire\nand more")

    return {None: original, "silent": Silent, "failing": Failing}
