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
HANDLE, CHILD = 4711, 4712
ID = bytes(range(128))


class FakeNccl:
    """A library whose functions take their arguments as C does.

    It answers from `states`, and from `splitting` once it is asked to split; the last one of each for ever.
    """

    def __init__(self, splits: bool = True) -> None:
        self.states = [nccl_binding.SUCCESS]
        self.splitting = [nccl_binding.SUCCESS]
        self.half_made = False  # whether a split that fails or is aborted leaves a communicator
        self._child: object = None  # where the handle of the child goes
        self.made = nccl_binding.IN_PROGRESS  # what making a communicator returns
        self.seen: list[tuple] = []
        self.grouped = nccl_binding.SUCCESS  # what the end of a group returns
        self.aborted = threading.Event()
        answers = {
            "ncclGetUniqueId": self._unique_id, "ncclCommInitRankConfig": self._init,
            "ncclCommGetAsyncError": self._state, "ncclBroadcast": self._broadcast, "ncclCommAbort": self._abort,
            "ncclGroupStart": lambda: self._group("start"), "ncclGroupEnd": lambda: self._group("end"),
        } | ({"ncclCommSplit": self._split} if splits else {})  # fmt: skip
        functions = {name: self._function(name, answer) for name, answer in answers.items()}
        self.library = SimpleNamespace(**functions, ncclGetErrorString=text, ncclGetLastError=text)

    def _function(self, name: str, answer: Callable[..., int]) -> object:
        signatures = nccl_binding.SIGNATURES | {"ncclCommSplit": nccl_binding.SPLIT_SIGNATURE}
        return ctypes.CFUNCTYPE(ctypes.c_int, *signatures[name])(answer)

    def _unique_id(self, made: object) -> int:
        ctypes.memmove(made, ID, len(ID))
        return nccl_binding.SUCCESS

    def _init(self, comm: object, count: int, place: nccl_binding.UniqueId, rank: int, config: object) -> int:
        comm[0] = HANDLE if self.made != FAILED else None
        given = config.contents
        self.seen.append((count, bytes(place), rank, given.size, given.magic, given.version, given.blocking))
        return self.made

    def _split(self, comm: int, color: int, key: int, child: object, config: object) -> int:
        given = config.contents
        self.seen.append(("split", comm, color, key, given.size, given.magic, given.version, given.blocking))
        child[0] = None
        self.states, self._child = self.splitting, child
        return nccl_binding.SUCCESS  # NCCL says so while the split is in progress

    def _state(self, comm: int, state: object) -> int:
        state[0] = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if self._child and state[0] == nccl_binding.SUCCESS:
            self._child[0] = CHILD
        assert comm == HANDLE, "only the first communicator has calls that are waited for"
        return nccl_binding.SUCCESS

    def _broadcast(self, *arguments: int) -> int:
        self.seen.append(arguments)
        return self.states.pop(0)

    def _group(self, what: str) -> int:
        self.seen.append((what,))
        return self.grouped if what == "end" else nccl_binding.SUCCESS

    def _abort(self, comm: int) -> int:
        self.seen.append(("abort", comm))
        self.aborted.set()
        if self._child and self.half_made and comm == HANDLE:
            self._child[0] = CHILD  # the thread that makes it ends as it ends always
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


def test_several_broadcasts_go_to_nccl_in_one_group(fake: FakeNccl):
    comm = Comm(Library(fake.library), 2, 0, ID)
    fake.states = [nccl_binding.SUCCESS] * 3
    assert comm.broadcast_all([(1, 10), (2, 20)], 1, 77)
    one, other = ((pointer, pointer, nbytes, 0, 1, HANDLE, 77) for pointer, nbytes in ((1, 10), (2, 20)))
    assert fake.seen[1:] == [("start",), one, other, ("end",)]


@pytest.mark.parametrize(
    ("answers", "grouped", "says"),
    [
        ([nccl_binding.SUCCESS, FAILED], nccl_binding.SUCCESS, "ncclBroadcast failed"),
        ([nccl_binding.SUCCESS] * 2, FAILED, "ncclGroupEnd failed"),
    ],
)
def test_a_group_that_fails_is_ended_all_the_same(fake: FakeNccl, answers: list[int], grouped: int, says: str):
    comm = Comm(Library(fake.library), 2, 0, ID)
    fake.states, fake.grouped = [*answers, FAILED], grouped
    with pytest.raises(NcclError, match=says):
        comm.broadcast_all([(1, 10), (2, 20)], 1, 77)
    assert fake.seen[-1] == ("end",)


def test_a_failure_is_in_nccls_words(fake: FakeNccl):
    comm = Comm(Library(fake.library), 2, 0, ID)
    fake.states = [FAILED]
    with pytest.raises(NcclError, match=r"^the call before failed; socket closed; socket closed$"):
        comm.settled()
    with pytest.raises(NcclError, match=r"^ncclBroadcast failed; socket closed"):
        comm.broadcast(1, 1, 0, 0)


def test_a_join_is_asked_for_until_it_has_succeeded(fake: FakeNccl, alone, monkeypatch):
    fake.states = [nccl_binding.IN_PROGRESS] * 5 + [nccl_binding.SUCCESS]
    fake.splitting = [nccl_binding.IN_PROGRESS] * 5 + [nccl_binding.SUCCESS]
    connect(fake, alone(10), monkeypatch)
    assert (len(fake.states), len(fake.splitting)) == (1, 1)
    assert [one[0] for one in fake.seen] == [2, "split"]


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
    assert fake.seen[-1] == ("abort", HANDLE)


def test_a_join_that_fails_is_aborted(fake: FakeNccl, alone, monkeypatch):
    fake.states = [nccl_binding.IN_PROGRESS, FAILED]
    with pytest.raises(NcclError, match="socket closed"):
        connect(fake, alone(60), monkeypatch)
    assert [one[0] for one in fake.seen] == [2, "abort"]


def test_the_broadcasts_are_those_of_a_child_that_blocks(fake: FakeNccl, alone, monkeypatch):
    comm = connect(fake, alone(10), monkeypatch)
    assert fake.seen[1:] == [("split", HANDLE, 0, 0, 24, 0xCAFEBEEF, 21400, 1)]
    fake.states = [nccl_binding.SUCCESS]
    assert comm.broadcast(2**40, 2**35, 1, 77)
    assert fake.seen[-1] == (2**40, 2**40, 2**35, 0, 1, CHILD, 77)
    comm.abort()
    assert fake.seen[-2:] == [("abort", CHILD), ("abort", HANDLE)], "what runs on the device first"


def test_the_key_of_a_split_is_the_rank(fake: FakeNccl):
    comm = Comm(Library(fake.library), 3, 2, ID)
    comm.split()
    assert fake.seen[-1][:4] == ("split", HANDLE, 0, 2)


def test_nccl_before_2_18_broadcasts_as_it_joined(alone, monkeypatch):
    fake = FakeNccl(splits=False)
    comm = connect(fake, alone(10), monkeypatch)
    fake.states = [nccl_binding.IN_PROGRESS, nccl_binding.SUCCESS]
    assert not comm.broadcast(2**40, 2**35, 1, 77)
    assert fake.seen[-1][5] == HANDLE
    assert comm.settled()
    comm.abort()
    assert [one[0] for one in fake.seen] == [2, 2**40, "abort"]


@pytest.mark.parametrize("half_made", [False, True])
def test_a_split_that_never_ends_is_aborted_at_the_deadline(fake: FakeNccl, alone, monkeypatch, half_made: bool):
    fake.splitting, fake.half_made = [nccl_binding.IN_PROGRESS], half_made
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 0 has not connected, for which it needs the others, within 0\.5 s"):
        connect(fake, alone(0.5), monkeypatch)
    assert time.monotonic() - began_s < 4
    child = [("abort", CHILD)] if half_made else []
    assert fake.seen[2:] == [("abort", HANDLE), *child], "what makes the child has to end first"


def test_a_split_ends_when_another_rank_refuses(fake: FakeNccl, alone, monkeypatch):
    fake.splitting = [nccl_binding.IN_PROGRESS]
    meeting = alone(60)
    threading.Timer(0.2, meeting.client().set, ["refused", "GroupError: rank 1 has no memory left"]).start()
    with pytest.raises(GroupError, match="rank 1 has no memory left"):
        connect(fake, meeting, monkeypatch)
    assert fake.seen[2:] == [("abort", HANDLE)]


def test_a_split_that_fails_is_aborted(fake: FakeNccl, alone, monkeypatch):
    fake.splitting, fake.half_made = [nccl_binding.IN_PROGRESS, FAILED], True
    with pytest.raises(NcclError, match="the call before failed; socket closed"):
        connect(fake, alone(60), monkeypatch)
    assert fake.seen[2:] == [("abort", HANDLE), ("abort", CHILD)]


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


@pytest.mark.parametrize("answers", [[nccl_binding.IN_PROGRESS] * 3 + [nccl_binding.SUCCESS], [FAILED]])
def test_kernels_are_loaded_by_a_group_of_one_which_is_ended(fake: FakeNccl, monkeypatch, answers: list[int]):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(nccl, "load_library", lambda: Library(fake.library))
    fake.states = answers
    nccl.load_kernels.__wrapped__(torch.device("cpu"))  # it is done once a device
    assert [one[:3] for one in fake.seen] == [(1, ID, 0), ("abort", HANDLE)]
