"""Handles give the tensor that was handed over, whatever its form; what is no handle opens and calls nothing."""

import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import rebuild_tensor, reduce_tensor

from extensions.colocate import HandleSender
from extensions.devices import CPU_DEVICE_ID, device_id
from extensions.handles import CUDA_FIELDS, HandleError, _plain_cuda, open_handle
from extensions.segments import RUN_ID, SHARED_MEMORY, SharedSegment
from suite.processes import wire
from suite.selftest.properties import examples
from suite.selftest.ranks import same_bits, seeded

CPU = torch.device("cpu")
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex32, torch.complex64, torch.complex128,
]  # fmt: skip
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@pytest.fixture(scope="module")
def segment() -> Iterator[SharedSegment]:
    segment = SharedSegment(1 << 16)
    yield segment
    segment.unlink()


@pytest.fixture
def handle(segment: SharedSegment) -> dict:
    """A good one: 6 x 4 float32, which lies behind another tensor."""
    return segment.fill([("first", torch.ones(3)), ("weight", seeded(torch.float32, (6, 4), 1))])["weight"]


@pytest.fixture(autouse=True)
def shared_files() -> Iterator[None]:
    """No test leaves anything in shared memory."""
    before = set(os.listdir(SHARED_MEMORY))
    yield
    assert [name for name in set(os.listdir(SHARED_MEMORY)) - before if name.startswith("weight-sync-x")] == []


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any dtype and shape, dense or permuted or a part of a larger one or expanded."""
    shape = draw(shapes)
    tensor = seeded(draw(st.sampled_from(DTYPES)), shape, draw(st.integers(0, 9)))
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for dim, size in enumerate(tensor.shape):
        start = draw(st.integers(0, size))
        tensor = tensor.narrow(dim, start, draw(st.integers(0, size - start)))
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor


# ---- what comes out


@given(st.lists(tensors(), min_size=1, max_size=5))
@examples(2)
def test_any_tensors_come_out_as_they_went_in(some: list[torch.Tensor]):
    segment = SharedSegment(SharedSegment.size_for(some))
    handles = segment.fill([(str(index), tensor) for index, tensor in enumerate(some)])
    handles = wire.decode(wire.encode(handles))  # plain data
    opened = [open_handle(handles[str(index)], CPU) for index in range(len(some))]
    segment.unlink()
    assert not (SHARED_MEMORY / segment.name).exists()
    assert all(map(same_bits, opened, some)), "expected the memory to stay as long as it is mapped"


@given(tensors().filter(lambda tensor: tensor.dtype != torch.complex32))
def test_torchs_own_pair_is_opened_without_being_called(tensor: torch.Tensor):
    function, arguments = reduce_tensor(tensor)
    assert function is rebuild_tensor
    for pair in ((function, arguments), [function, list(arguments)]):
        opened = open_handle(pair, CPU)
        assert same_bits(opened, tensor)
        assert opened.data_ptr() == tensor.data_ptr() or tensor.numel() == 0


@pytest.mark.parametrize(("shape", "stride"), [((1,), (0,)), ((1, 1), (7, 5)), ((2, 1), (1, 9)), ((0,), (0,))])
def test_strides_that_mean_nothing_change_nothing(segment: SharedSegment, shape: tuple, stride: tuple):
    tensor = seeded(torch.float32, (20,), 3).as_strided(shape, stride)
    assert tensor.is_contiguous()
    assert same_bits(open_handle(segment.fill([("a", tensor)])["a"], CPU), tensor)


def test_a_handle_maps_what_the_sender_writes_later(segment: SharedSegment, handle: dict):
    opened = open_handle(handle, CPU)
    segment.fill([("first", torch.ones(3)), ("weight", torch.zeros(6, 4))])
    assert not opened.any()


def test_a_parameter_is_handed_over_as_a_tensor():
    opened = open_handle(reduce_tensor(torch.nn.Parameter(torch.ones(3))), CPU)
    assert (type(opened), opened.requires_grad) == (torch.Tensor, False)


# ---- what does not open


def refused(handle: object, said: str | None = None, device: torch.device = CPU) -> str:
    with pytest.raises(HandleError, match=said) as caught:
        open_handle(handle, device)
    assert len(str(caught.value)) < 1000, "expected a message that can be read"
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "weight-sync-../../etc/passwd", "/etc/passwd", "../etc/passwd", "weight-sync-", "weight-sync-a\n",
        "weight-sync-a/b", "weight-sync-a\0", "weight-sync-" + "a" * 81, "torch_1_2_3", "", None, 3, b"weight-sync-a",
    ],
)  # fmt: skip
def test_only_a_segments_own_name_is_opened(handle: dict, name: object):
    refused(handle | {"segment": name}, "expected a segment called weight-sync-")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [7, 4]}, {"shape": [6, 5]}, {"stride": [5, 1]}, {"stride": [4, 2]}, {"storage_offset": 1},
        {"shape": [2**40, 2**40], "stride": [0, 0]}, {"shape": [2**21 + 1] * 3, "stride": [0] * 3},
        {"shape": [2**47, 2], "stride": [0, 0]}, {"shape": [1] * 65, "stride": [1] * 65}, {"shape": [2**63, 1]},
        {"shape": [2**47], "stride": [2**47]}, {"shape": [1] * 100_000, "stride": [1] * 100_000},
        {"shape": [-6, -4]}, {"stride": [-4, 1]}, {"shape": [True, 4]}, {"shape": [6.0, 4]}, {"shape": ["6", 4]},
        {"shape": 24}, {"shape": None}, {"shape": "64"}, {"shape": [24]}, {"stride": [1]}, {"shape": {6: 4}},
        {"storage_offset": -1}, {"storage_offset": True}, {"storage_offset": 2**63}, {"storage_offset": None},
        {"storage_bytes": 95}, {"storage_bytes": -96}, {"storage_bytes": 2**47}, {"storage_bytes": 96.0},
        {"storage_bytes": 3, "shape": [0], "stride": [1]},
        {"offset_bytes": -64}, {"offset_bytes": 65}, {"offset_bytes": 1 << 16}, {"offset_bytes": True},
        {"offset_bytes": 2**64}, {"offset_bytes": "64"},
        {"dtype": "float64"}, {"dtype": "nonsense"}, {"dtype": None}, {"dtype": 4}, {"dtype": "nn"}, {"dtype": ""},
        {"kind": "cuda_ipc"}, {"kind": "file"}, {"kind": None}, {"kind": "x" * 100_000}, {"more": 1}, {1: 2},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_handle_with_something_wrong_is_refused(handle: dict, change: dict):
    refused(handle | change)


@pytest.mark.parametrize(
    "field", ["kind", "segment", "dtype", "shape", "stride", "storage_offset", "storage_bytes", "offset_bytes"]
)
def test_a_handle_that_lacks_a_field_is_refused(handle: dict, field: str):
    del handle[field]
    refused(handle)


@given(
    st.fixed_dictionaries(
        {
            "shape": st.lists(st.integers(-1, 70), max_size=4),
            "stride": st.lists(st.integers(-1, 70), max_size=4),
            "storage_offset": st.integers(-1, 200),
            "storage_bytes": st.integers(-1, 5000),
            "offset_bytes": st.integers(-1, 80).map(lambda lines: lines * 64),
            "dtype": st.sampled_from(["bool", "bfloat16", "float32", "complex128"]),
        }
    )
)
@examples(4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_opens_lies_inside_the_segment(segment: SharedSegment, handle: dict, change: dict):
    try:
        opened = open_handle(handle | change, CPU)
    except HandleError:
        return
    first = opened.storage_offset() * opened.element_size()
    assert opened.untyped_storage().nbytes() == segment.nbytes
    assert 0 <= change["offset_bytes"] <= first <= segment.nbytes
    if opened.numel():
        reach = sum((size - 1) * step for size, step in zip(opened.shape, opened.stride(), strict=True)) + 1
        assert first + reach * opened.element_size() <= change["offset_bytes"] + change["storage_bytes"]
        opened.float().sum()  # all of it can be read


@pytest.mark.parametrize("thing", [None, 1, "ab", b"ab", (), (1, 2), ["a", "b"], {}, {"kind": []}, [print]])
def test_what_is_no_handle_is_refused(thing: object):
    refused(thing)


def test_a_segment_that_is_gone_short_or_empty_is_refused(handle: dict):
    path = SHARED_MEMORY / f"weight-sync-x-{os.getpid()}-short"
    refused(handle | {"segment": path.name}, "is not there: has the sender released it")
    try:
        path.write_bytes(b"0" * 100)
        refused(handle | {"segment": path.name}, "expected 96 bytes of float32 at 64 inside .*, found 100")
        path.write_bytes(b"")
        nothing = {"shape": [0], "stride": [1], "storage_bytes": 0, "offset_bytes": 0}
        refused(handle | {"segment": path.name} | nothing, "found 0")
    finally:
        path.unlink()


def test_a_link_or_a_directory_is_no_segment(handle: dict, segment: SharedSegment, tmp_path: Path):
    path = SHARED_MEMORY / f"weight-sync-x-{os.getpid()}-link"
    path.symlink_to(SHARED_MEMORY / segment.name)
    try:
        refused(handle | {"segment": path.name}, "is not there")
    finally:
        path.unlink()
    path.mkdir()
    try:
        refused(handle | {"segment": path.name}, "is not there")
    finally:
        path.rmdir()


# ---- pairs


class Trap:
    """Notices when it is called, or asked for anything that is its own."""

    touched: list[str] = []  # noqa: RUF012

    def __call__(self, *_: object) -> torch.Tensor:
        self.touched.append("called")
        return torch.ones(1)

    def __getattr__(self, name: str) -> str:
        self.touched.append(name)
        return "rebuild_tensor"

    def __str__(self) -> str:
        self.touched.append("str")
        return "rebuild_tensor"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        self.touched.append("==")
        return True

    __hash__ = None


def test_a_foreign_callable_is_never_called(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.touch()
    pair = reduce_tensor(torch.ones(3))
    for foreign in (Trap(), Trap, os.unlink, pickle.loads, eval, torch.load, pair[0].__call__, lambda *_: None):
        arguments = (str(victim),) if foreign is os.unlink else pair[1]
        said = refused((foreign, arguments), "is not torch's function for a tensor on cpu; it was not called")
        assert len(said) < 300
    assert victim.exists()
    assert Trap.touched == []


def test_the_function_is_told_by_identity_not_by_name():
    def rebuild_tensor(*_: object) -> torch.Tensor:
        raise AssertionError("called")

    rebuild_tensor.__module__ = "torch.multiprocessing.reductions"
    refused((rebuild_tensor, reduce_tensor(torch.ones(3))[1]), "was not called")


def test_another_devices_pair_or_handle_is_refused(handle: dict):
    refused(reduce_tensor(torch.ones(3)), "is not torch's function for a tensor on cuda", torch.device("cuda", 0))
    refused(handle, "expected a handle that device cuda:0 can open", torch.device("cuda", 0))


def test_arguments_that_reach_outside_their_storage_are_refused():
    function, (cls, storage, (offset, shape, stride, _)) = reduce_tensor(torch.ones(3, 4))
    for layout in ((1, shape, stride), (offset, (4, 4), stride), (-1, shape, stride), (0, 5, 1), (0, None, stride)):
        refused((function, (cls, storage, (*layout, False))))
    for arguments in (None, (), (cls, storage), (cls, None, (0, shape, stride, False)), "abc", {}, (1, 2, 3)):
        refused((function, arguments))
    meta = torch.empty(12, device="meta").untyped_storage()
    fake = torch.TypedStorage(wrap_storage=meta, dtype=torch.float32, _internal=True)
    refused((function, (cls, fake, (offset, shape, stride, False))), "expected a CPU storage")


# ---- CUDA's handles, as far as they can be looked at without a GPU


def cuda_arguments(**changes: object) -> tuple:
    fields = {
        "shape": torch.Size([2, 3]), "stride": (3, 1), "storage_offset": 0, "storage_class": torch.UntypedStorage,
        "dtype": torch.bfloat16, "device_index": 7, "memory_handle": b"m" * 64, "storage_bytes": 12,
        "storage_offset_bytes": 512, "requires_grad": True, "ref_counter_handle": b"/torch_1_2_3",
        "ref_counter_offset": 0, "event_handle": b"e" * 64, "event_sync_required": True,
    }  # fmt: skip
    assert tuple(fields) == CUDA_FIELDS
    return (torch.Tensor, *(fields | changes).values())


def test_a_cuda_handle_is_plain_data_without_the_senders_ordinal():
    handle = _plain_cuda(cuda_arguments())
    assert wire.decode(wire.encode(handle)) == handle
    assert handle["dtype"] == "bfloat16"
    assert "device_index" not in handle


@pytest.mark.parametrize(
    "change",
    [
        {"memory_handle": "text"}, {"memory_handle": None}, {"event_handle": 3}, {"ref_counter_handle": None},
        {"storage_bytes": 11}, {"storage_bytes": -1}, {"storage_offset_bytes": True}, {"ref_counter_offset": 2**48},
        {"shape": [2, 4]}, {"shape": [2**40] * 2, "stride": [0, 0]}, {"stride": [-3, 1]}, {"storage_offset": 1},
        {"dtype": "nonsense"}, {"device_index": 0}, {"storage_class": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_cuda_handle_never_reaches_torch(change: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *_: pytest.fail("called"))
    refused(_plain_cuda(cuda_arguments()) | change, device=torch.device("cuda", 0))


@pytest.mark.parametrize("change", [{"shape": 5}, {"stride": None}, {"dtype": "nonsense"}, {"dtype": None}])
def test_a_wrong_cuda_pair_is_refused(change: dict):
    with pytest.raises(HandleError):
        _plain_cuda(cuda_arguments(**change))
    with pytest.raises(HandleError, match="expected 15 arguments of a CUDA tensor, found 14"):
        _plain_cuda(cuda_arguments()[1:])


def test_a_cuda_handle_is_opened_on_the_receivers_own_ordinal(monkeypatch: pytest.MonkeyPatch):
    calls = []
    fake = lambda *arguments: calls.append(arguments)  # noqa: E731
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", fake)
    open_handle(_plain_cuda(cuda_arguments()), torch.device("cuda", 2))
    open_handle((fake, cuda_arguments()), torch.device("cuda", 3))
    assert [call[CUDA_FIELDS.index("device_index") + 1] for call in calls] == [2, 3]
    assert [call[0] for call in calls] == [torch.Tensor] * 2
    assert not any(call[CUDA_FIELDS.index("requires_grad") + 1] for call in calls)


def test_a_counter_outside_the_senders_counters_is_refused(monkeypatch: pytest.MonkeyPatch):
    """torch would write to that place in shared memory, whatever is there."""
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *found: found)
    path = SHARED_MEMORY / f"torch_{os.getpid()}_selftest"
    opening = {"ref_counter_handle": f"/{path.name}".encode(), "ref_counter_offset": 3}
    path.write_bytes(bytes(4 * 8))
    try:
        assert open_handle(_plain_cuda(cuda_arguments(**opening)), torch.device("cuda", 0))
        beyond = _plain_cuda(cuda_arguments(**opening | {"ref_counter_offset": 4}))
        refused(beyond, "ref_counter_offset: 4 is outside torch_", torch.device("cuda", 0))
    finally:
        path.unlink()
    assert open_handle(beyond, torch.device("cuda", 0)), "expected a sender that has gone to be no error, as in torch"


def test_the_name_of_counters_is_such_as_torch_gives():
    """CUDA's handles name their counters as handles of CPU storages name their memory: at::NewProcessWideShmHandle."""
    _, name, _ = torch.ones(3).untyped_storage()._share_filename_cpu_()
    assert open_counters(name)


def open_counters(name: bytes) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *_: True)
        return open_handle(_plain_cuda(cuda_arguments(ref_counter_handle=name)), torch.device("cuda", 0))


def test_what_cuda_can_not_open_is_a_handle_error(monkeypatch: pytest.MonkeyPatch):
    def rebuild(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid argument\nCUDA kernel errors might be ...")

    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)
    said = refused(_plain_cuda(cuda_arguments()), device=torch.device("cuda", 1))
    assert said == "CUDA could not open the memory on cuda:1: CUDA error: invalid argument"


def test_what_is_in_expandable_segments_says_what_it_takes_to_open_it(monkeypatch: pytest.MonkeyPatch):
    def rebuild(*_: object) -> torch.Tensor:
        raise RuntimeError("pidfd_getfd: Operation not permitted")

    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)
    for handle, named in ((b"\x02e" + bytes(40), True), (b"\x03e" + bytes(40), True), (b"\x02c" + bytes(64), False)):
        said = refused(_plain_cuda(cuda_arguments(memory_handle=handle)), device=torch.device("cuda", 1))
        assert said.startswith("CUDA could not open the memory on cuda:1: pidfd_getfd: Operation not permitted")
        assert ("expandable_segments:True" in said) == named


# ---- ids and the sender


def test_the_id_of_host_memory_is_the_machines_or_what_a_stage_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CPU_DEVICE_ID, raising=False)
    own = device_id(CPU)
    assert own.startswith("CPU-")
    assert own == device_id(CPU)
    monkeypatch.setenv(CPU_DEVICE_ID, "node-3")
    assert device_id(CPU) == "node-3"


def test_the_sender_reuses_its_segment_and_leaves_nothing():
    sender = HandleSender("cpu")
    before = set(os.listdir(SHARED_MEMORY))
    big, small = seeded(torch.float32, (100, 7), 1), seeded(torch.bfloat16, (5,), 2)
    names = []
    for named in ([("a", big), ("b", small)], [("b", small)], [("a", big), ("b", small), ("c", big)]):
        ((device, handles),) = sender.handles(named).items()
        assert device == device_id(CPU)
        assert list(handles) == [name for name, _ in named]
        assert all(same_bits(open_handle(handles[name], CPU), tensor) for name, tensor in named)
        names.append(handles["b"]["segment"])
    assert names[0] == names[1] != names[2], "expected a new segment only where the old one is too small"
    sender.release()
    sender.release()
    assert set(os.listdir(SHARED_MEMORY)) == before


def test_a_segments_name_begins_with_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(RUN_ID, "../a b?c" * 20)
    segment = SharedSegment(64)
    try:
        assert segment.name.startswith("weight-sync-abcabc")
        tensor = torch.ones(4)
        assert same_bits(open_handle(segment.fill([("a", tensor)])["a"], CPU), tensor)
        assert (SHARED_MEMORY / segment.name).stat().st_mode & 0o077 == 0, "expected a file of its user's own"
    finally:
        segment.unlink()


def test_memory_that_is_not_there_fails_at_once_and_leaves_nothing():
    before = set(os.listdir(SHARED_MEMORY))
    with pytest.raises(OSError, match=r"No space|Cannot allocate|File too large|Invalid"):
        SharedSegment(2**50)
    assert set(os.listdir(SHARED_MEMORY)) == before


def test_segments_of_one_process_have_different_names():
    segments = [SharedSegment(64) for _ in range(3)]
    assert all(a.name != b.name for a, b in itertools.combinations(segments, 2))
    for segment in segments:
        segment.unlink()
