"""NCCL's functions, called as the binding calls them, in a library that does as it is told."""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from extensions.group import GroupError, nccl, nccl_binding
from extensions.group.basics import in_a_thread
from extensions.group.nccl_binding import Comm, Config, Library, NcclError
from extensions.group.rendezvous import Rendezvous
from suite.processes.local import free_port

SOON_S = 10.0
FAILED = 3  # ncclInternalError
HANDLE = 4711
ID = bytes(range(128))


class FakeNccl:
    """A library whose functions take their arguments as C does. It answers from `states`, the last one for ever."""

    def __init__(self) -> None:
        self.states = [nccl_binding.SUCCESS]
        self.made = nccl_binding.IN_PROGRESS  # what making a communicator returns
        self.seen: list[tuple] = []
        self.aborted = threading.Event()
        answers = {
            "ncclGetUniqueId": self._unique_id, "ncclCommInitRankConfig": self._init,
            "ncclCommGetAsyncError": self._state, "ncclBroadcast": self._broadcast, "ncclCommAbort": self._abort,
        }  # fmt: skip
        functions = {name: self._function(name, answer) for name, answer in answers.items()}
        self.library = SimpleNamespace(**functions, ncclGetErrorString=text, ncclGetLastError=text)

    def _function(self, name: str, answer: Callable[..., int]) -> object:
        return ctypes.CFUNCTYPE(ctypes.c_int, *nccl_binding.SIGNATURES[name])(answer)

    def _unique_id(self, made: object) -> int:
        ctypes.memmove(made, ID, len(ID))
        return nccl_binding.SUCCESS

    def _init(self, comm: object, count: int, place: nccl_binding.UniqueId, rank: int, config: object) -> int:
        comm[0] = HANDLE if self.made != FAILED else None
        given = config.contents
        self.seen.append((count, bytes(place), rank, given.size, given.magic, given.version, given.blocking))
        return self.made

    def _state(self, comm: int, state: object) -> int:
        assert comm == HANDLE
        state[0] = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return nccl_binding.SUCCESS

    def _broadcast(self, *arguments: int) -> int:
        self.seen.append(arguments)
        return self.states.pop(0)

    def _abort(self, comm: int) -> int:
        assert comm == HANDLE
        self.seen.append(("abort",))
        self.aborted.set()
        return nccl_binding.SUCCESS


def text(_: object) -> bytes:
    return b"socket closed"


@pytest.fixture
def fake() -> FakeNccl:
    return FakeNccl()


@pytest.fixture
def alone() -> Iterator[Callable[[float], Rendezvous]]:
    """Makes a rendezvous of two, of which only rank 0 is there."""
    made: list[Rendezvous] = []

    def make(timeout_s: float) -> Rendezvous:
        made.append(Rendezvous("127.0.0.1", free_port(), 0, 2, timeout_s))
        return made[-1]

    yield make
    for meeting in made:
        meeting.store = None


def connect(fake: FakeNccl, meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> Comm:
    """Join as rank 0, where rank 1 is only what the store says of it."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    meeting.store.set("begun to connect/1", "")
    meeting.store.set("connected/1", "NCCL")
    joining = in_a_thread(lambda: nccl.connect(Library(fake.library), meeting, torch.device("cpu")))
    return joining.result(SOON_S)


def test_a_communicator_is_asked_for_as_nccl_2_14_had_it(fake: FakeNccl):
    library = Library(fake.library)
    assert library.unique_id() == ID
    Comm(library, 3, 1, ID)
    assert fake.seen == [(3, ID, 1, 24, 0xCAFEBEEF, 21400, 0)]
    assert Config.blocking.offset == 16


def test_a_broadcast_is_of_bytes_in_place(fake: FakeNccl):
    comm = Comm(Library(fake.library), 2, 0, ID)
    fake.states = [nccl_binding.IN_PROGRESS, nccl_binding.IN_PROGRESS, nccl_binding.SUCCESS]
    assert not comm.broadcast(2**40, 2**35, 1, 77)
    assert fake.seen[-1] == (2**40, 2**40, 2**35, 0, 1, HANDLE, 77)
    assert not comm.settled()
    assert comm.settled()


def test_a_failure_is_in_nccls_words(fake: FakeNccl):
    comm = Comm(Library(fake.library), 2, 0, ID)
    fake.states = [FAILED]
    with pytest.raises(NcclError, match=r"^the call before failed; socket closed; socket closed$"):
        comm.settled()
    with pytest.raises(NcclError, match=r"^ncclBroadcast failed; socket closed"):
        comm.broadcast(1, 1, 0, 0)


def test_a_join_is_asked_for_until_it_has_succeeded(fake: FakeNccl, alone, monkeypatch):
    fake.states = [nccl_binding.IN_PROGRESS] * 5 + [nccl_binding.SUCCESS]
    connect(fake, alone(10), monkeypatch).abort()
    assert [one[0] for one in fake.seen] == [2, "abort"]


def test_a_join_that_never_ends_is_aborted_at_the_deadline(fake: FakeNccl, alone, monkeypatch):
    fake.states = [nccl_binding.IN_PROGRESS]
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 0 has not connected, for which it needs the others, within 0\.5 s"):
        connect(fake, alone(0.5), monkeypatch)
    assert time.monotonic() - began_s < 4
    assert [one[0] for one in fake.seen] == [2, "abort"]


def test_a_join_ends_when_another_rank_refuses(fake: FakeNccl, alone, monkeypatch):
    fake.states = [nccl_binding.IN_PROGRESS]
    meeting = alone(60)
    threading.Timer(0.2, meeting.client().set, ["refused", "GroupError: rank 1 has no memory left"]).start()
    began_s = time.monotonic()
    with pytest.raises(GroupError, match="rank 1 has no memory left"):
        connect(fake, meeting, monkeypatch)
    assert time.monotonic() - began_s < 4
    assert fake.seen[-1] == ("abort",)


def test_a_join_that_fails_is_aborted(fake: FakeNccl, alone, monkeypatch):
    fake.states = [nccl_binding.IN_PROGRESS, FAILED]
    with pytest.raises(NcclError, match="socket closed"):
        connect(fake, alone(60), monkeypatch)
    assert [one[0] for one in fake.seen] == [2, "abort"]


def test_where_no_communicator_was_made_nothing_is_aborted(fake: FakeNccl):
    fake.made = FAILED
    with pytest.raises(NcclError, match="ncclCommInitRankConfig failed"):
        Comm(Library(fake.library), 2, 0, ID)
    assert not fake.aborted.is_set()


def test_a_setting_that_would_block_is_refused(fake: FakeNccl, monkeypatch):
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "1")
    with pytest.raises(NcclError, match="NCCL_COMM_BLOCKING=1 no deadline would end a call into NCCL; unset it"):
        Comm(Library(fake.library), 2, 0, ID)
    assert fake.seen == []


def test_a_host_without_nccl_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nccl.load_library.cache_clear()
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", str(tmp_path / "libnccl.so"))
    with pytest.raises(GroupError, match="vLLM finds no NCCL; is it installed with vLLM, or VLLM_NCCL_SO_PATH set"):
        nccl.load_library()
