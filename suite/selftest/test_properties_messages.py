"""What is announced arrives as it was; anything wrong with it is refused, by name, and nothing has changed."""

import copy
import socket
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch.multiprocessing import reductions

from extensions.bracket import UpdateError
from extensions.devices import device_id
from extensions.handles import CUDA_FIELDS, HandleError, _plain_cuda, open_handle
from extensions.manifest import ManifestError, check, manifest_of, parse
from extensions.segments import SharedSegment
from extensions.tensors import dtype_name, dtype_of
from suite.actors.link import Link, LinkError
from suite.processes import wire
from suite.selftest.fakes import CPU, SHAPES, Worker, fitted, tensors, untouched
from suite.selftest.properties import examples

DEADLINE_S = 10
DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]

dtypes = st.sampled_from(DTYPES)
names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1).filter(str.isprintable)


@st.composite
def shapes(draw: st.DrawFn, bits: int = 47) -> list[int]:
    """Up to five sizes of a tensor with no more than 2**bits elements."""
    sizes = []
    for _ in range(draw(st.integers(0, 5))):
        sizes.append(draw(st.integers(0, 2**bits)))
        bits -= min(bits, sizes[-1].bit_length())
    return sizes


@st.composite
def manifests(draw: st.DrawFn) -> list[dict]:
    """One to six entries with different names."""
    entry = st.fixed_dictionaries({"name": names, "dtype": dtypes.map(dtype_name), "shape": shapes()})
    return draw(st.lists(entry, min_size=1, max_size=6, unique_by=lambda entry: entry["name"]))


@st.composite
def cuda_pairs(draw: st.DrawFn) -> tuple:
    """torch's arguments of a CUDA tensor: any layout inside its storage."""
    dtype, shape = draw(dtypes), draw(shapes(bits=20))
    stride = [draw(st.integers(0, 2**20)) for _ in shape]
    offset = draw(st.integers(0, 2**20))
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0
    empty = not all(shape)
    fields = {
        "shape": torch.Size(shape), "stride": tuple(stride), "storage_offset": 0 if empty else offset,
        "storage_class": torch.UntypedStorage, "dtype": dtype, "device_index": draw(st.integers(0, 7)),
        "memory_handle": draw(st.binary(min_size=1, max_size=80)),
        "storage_bytes": (offset + reach) * dtype.itemsize + draw(st.integers(0, 100)),
        "storage_offset_bytes": draw(st.integers(0, 2**40)), "requires_grad": draw(st.booleans()),
        "ref_counter_handle": f"/torch_{draw(st.integers(1, 2**31))}_0_1".encode(),
        "ref_counter_offset": draw(st.integers(0, 9999)), "event_handle": draw(st.binary(min_size=64, max_size=64)),
        "event_sync_required": draw(st.booleans()),
    }  # fmt: skip
    assert tuple(fields) == CUDA_FIELDS
    return (torch.Tensor, *fields.values())


def through_a_line(message: dict) -> dict:
    """As a trainer sends it and an engine receives it."""
    here, there = socket.socketpair()
    with here, there:
        Link(here, "the engine").send(message, DEADLINE_S)
        return Link(there, "the trainer").receive(DEADLINE_S)


# ---- what is right arrives


@given(manifests())
def test_any_manifest_goes_through_as_plain_data(manifest: list[dict]):
    parsed = parse(through_a_line({"manifest": manifest})["manifest"])
    assert list(parsed) == [entry["name"] for entry in manifest], "expected the order of sending"
    found = [{"name": n, "dtype": dtype_name(dtype), "shape": list(shape)} for n, (dtype, shape) in parsed.items()]
    assert found == [entry | {"dtype": dtype_name(dtype_of(entry["dtype"]))} for entry in manifest]


@given(st.dictionaries(names, st.tuples(st.lists(st.integers(0, 4), max_size=3), dtypes), min_size=1, max_size=5))
def test_the_manifest_of_tensors_says_what_they_are(layout: dict[str, tuple[list[int], torch.dtype]]):
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()}
    parsed = parse(manifest_of(tensors.items()))
    assert parsed == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@given(names, cuda_pairs(), st.integers(0, 7))
@examples(2)
def test_any_layout_reaches_torch_as_torch_gave_it(name: str, arguments: tuple, own: int):
    """Strides, offsets, handles: everything but the sender's ordinal, and what there is one right value for."""
    message = through_a_line({"handles": {"GPU-own": {name: _plain_cuda(arguments)}}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "rebuild_cuda_tensor", lambda *found: found)
        found = open_handle(message["handles"]["GPU-own"][name], torch.device("cuda", own))
    expected = dict(zip(CUDA_FIELDS, arguments[1:], strict=True)) | {"device_index": own, "requires_grad": False}
    assert dict(zip(CUDA_FIELDS, found[1:], strict=True)) == expected
    assert found[0] is torch.Tensor


# ---- frames


def broken_frames(frame: bytes) -> st.SearchStrategy[bytes]:
    """A frame with a byte changed, bytes lost, or bytes that do not belong there."""
    place, part = st.integers(0, len(frame) - 1), st.binary(min_size=1, max_size=9)
    changed = st.tuples(place, st.integers(1, 255)).map(
        lambda at: frame[: at[0]] + bytes([frame[at[0]] ^ at[1]]) + frame[at[0] + 1 :]
    )
    cut = place.map(lambda end: frame[:end])
    lost = place.map(lambda at: frame[:at] + frame[at + 1 :])
    more = st.tuples(st.integers(0, len(frame) - 1), part).map(lambda at: frame[: at[0]] + at[1] + frame[at[0] :])
    return st.one_of(changed, cut, lost, more.filter(lambda found: not found.startswith(frame)))


@given(manifests(), st.data())
@examples(5)
def test_any_damaged_frame_is_refused(manifest: list[dict], data: st.DataObject):
    here, there = socket.socketpair()
    with here, there:
        wire.send(here, {"manifest": manifest})
        frame = there.recv(1 << 20)
        here.sendall(data.draw(broken_frames(frame)))
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkError, match="the trainer is gone or sends nonsense: ") as caught:
            Link(there, "the trainer").receive(DEADLINE_S)
    assert len(str(caught.value)) < 1000


# ---- manifests


HUGE = [[2**24, 2**25], [0, 2**47, 2**47], [1] * 65, [2**63], [2**64 + 3], [-(2**63)], [-1, -1]]
WRONG_ENTRIES = [None, [], "name", {}, {"name": "a"}, 3, b"name"]
WRONG_FIELDS = {
    "name": [None, "", 3, b"a", "a\nb", "a\0", "\x1b[2J", "\u202eb", "\ud800", "a" * 1001, ["a"]],
    "dtype": [None, "", "bf16", "Tensor", 2, ["float32"], b"float32", "__dict__"],
    "shape": [None, 3, "33", b"33", [-1], [2**48], [1.0], [True], ["1"], [[1]], {1: 1}, [None], *HUGE],
}
corruptions = st.one_of(
    st.sampled_from(WRONG_ENTRIES).map(lambda wrong: lambda entry: wrong),
    *(
        st.sampled_from(wrong).map(lambda value, field=field: lambda entry: entry | {field: value})
        for field, wrong in WRONG_FIELDS.items()
    ),
    st.sampled_from(["name", "dtype", "shape"]).map(
        lambda gone: lambda entry: {key: value for key, value in entry.items() if key != gone}
    ),
    names.map(lambda more: lambda entry: entry | {f"{more}!": 1}),
)


@given(manifests(), st.data())
@examples(2)
def test_any_corrupted_manifest_is_refused_with_the_entry_named(manifest: list[dict], data: st.DataObject):
    index = data.draw(st.integers(0, len(manifest) - 1))
    wrong = copy.deepcopy(manifest)
    wrong[index] = data.draw(corruptions)(wrong[index])
    with pytest.raises(ManifestError, match=rf"^manifest entry {index}\b") as caught:
        parse(wrong)
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable(), "expected a message that does nothing to a terminal"
    if isinstance(wrong[index], dict) and wrong[index].keys() == {"name", "dtype", "shape"}:
        name = manifest[index]["name"]
        assert wrong[index]["name"] != name or name in str(caught.value)


@given(manifests(), st.data())
def test_a_name_that_is_there_twice_is_named(manifest: list[dict], data: st.DataObject):
    twice = data.draw(st.sampled_from(manifest))
    other = twice | {"shape": data.draw(shapes())}
    wrong = data.draw(st.permutations([*manifest, other]))
    with pytest.raises(ManifestError) as caught:
        parse(wrong)
    assert str(caught.value) == f"1 duplicate name: {twice['name']}"


@given(st.lists(st.sampled_from(["..", ".", "~", "a", "", "%2e", "weight-sync-x", "*"]), min_size=1, max_size=4))
def test_a_name_is_never_taken_for_a_path(parts: list[str]):
    """It is compared with the model's names, nothing else."""
    name = "/".join(parts) + "/"
    announced = parse([{"name": name, "dtype": "bfloat16", "shape": [4]}])
    with pytest.raises(ManifestError, match="unknown name: ") as caught:
        check(announced, {}, set())
    assert name in str(caught.value)


# ---- whole updates


@pytest.fixture(scope="module")
def segment() -> Iterator[SharedSegment]:
    segment = SharedSegment(1 << 12)
    yield segment
    segment.unlink()


ANYTHING = [None, True, -1, 1.5, "1", b"1", [], {}, [None], 2**48, 2**63, 2**64, -(2**63), "../../etc/passwd", "a\0"]
WRONG_HANDLES = {
    "kind": ["cuda_ipc", "file", *ANYTHING],
    "segment": ["weight-sync-../x", "weight-sync-x\n", "weight-sync-gone", "/dev/shm/x", *ANYTHING],
    "dtype": ["float64", "int32", "bfloat16", *ANYTHING],
    "shape": [[7], [2, 3, 1], [-2, -3], [2**40, 2**40], [2**63], "23", *ANYTHING],
    "stride": [[9999, 1], [2**62, 1], [-1, -1], [1] * 9, *ANYTHING],
    "storage_offset": [4096, 2**47, *ANYTHING],
    "storage_bytes": [1, 2**47, *ANYTHING],
    "offset_bytes": [1, 63, 4096, 2**47, *ANYTHING],
}
Change = Callable[[list, dict], str]  # of a manifest and handles; returns what a message has to name


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One thing made wrong somewhere in an update."""
    index = draw(st.integers(0, len(SHAPES) - 1))
    name = list(SHAPES)[index]
    kind = draw(st.sampled_from(["entry", "handle", "lost field", "more", "no handle", "entry twice", "entry lost"]))
    field = draw(st.sampled_from(list(WRONG_HANDLES)))
    value, corrupt = draw(st.sampled_from(WRONG_HANDLES[field])), draw(corruptions)

    def change(manifest: list, handles: dict) -> str:
        if kind == "entry":
            manifest[index] = corrupt(manifest[index])
            return f"manifest entry {index}"
        if kind == "handle":
            handles[name][field] = value
        if kind == "lost field":
            del handles[name][field]
        if kind == "more":
            handles[name]["more"] = value
        if kind == "no handle":
            handles[name] = value
        if kind == "entry twice":
            manifest.append(manifest[index])
        if kind == "entry lost":
            del manifest[index]
        return name

    return change


@given(changes())
@examples(8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_update_with_anything_wrong_changes_nothing(
    segment: SharedSegment, monkeypatch: pytest.MonkeyPatch, change: Change
):
    worker = fitted(monkeypatch)
    manifest, handles = manifest_of(tensors().items()), segment.fill(list(tensors().items()))
    named = change(manifest, handles)
    with pytest.raises((ManifestError, HandleError, UpdateError), match=named) as caught:
        update(worker, manifest, handles)
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()
    assert "load" not in worker.model.calls
    assert worker.abort_update() == "the weights are as they were before the update"
    assert untouched(worker)
    update(worker, manifest_of(tensors().items()), segment.fill(list(tensors().items())))
    assert all(torch.all(held == 1) for held in worker.model.held.values()), "expected the next update to be taken"


def update(worker: Worker, manifest: list, handles: dict) -> None:
    worker.begin_update(manifest)
    worker.update_weights_from_ipc_handles({device_id(CPU): handles})
    worker.end_update()


WRONG_CUDA = {
    "memory_handle": ["text", None, b"", 3], "ref_counter_offset": [-1, True, 2**63, "0"],
    "ref_counter_handle": [None, b"", b"torch_1", b"/weight-sync-x", b"/torch_/../x", b"/torch_1\n"],
    "event_handle": [None, b"", b"e" * 63, b"e" * 65, "e" * 64],
    "event_sync_required": [None, 0, 1, "yes"], "storage_bytes": [-1, 0, 2**63, 1.0],
    "storage_offset_bytes": [-1, 2**63, True], "storage_offset": [-1, 2**48, 2**63, 2**46],
    "shape": [[2**40, 2**40], [-1], [2**63], None, [1.0]], "stride": [[-1] * 9, None, ["1"]],
    "dtype": ["nonsense", None, 3],
}  # fmt: skip


@given(cuda_pairs().filter(lambda arguments: all(arguments[1]) and arguments[1]), st.data())
@examples(4)
def test_a_wrong_cuda_handle_never_reaches_torch(arguments: tuple, data: st.DataObject):
    handle = _plain_cuda(arguments)
    field = data.draw(st.sampled_from(list(WRONG_CUDA)))
    if data.draw(st.booleans()):
        handle[field] = data.draw(st.sampled_from(WRONG_CUDA[field]))
    elif data.draw(st.booleans()):
        del handle[field]
    else:
        handle[field + "!"] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "rebuild_cuda_tensor", lambda *_: pytest.fail("reached torch"))
        with pytest.raises(HandleError) as caught:
            open_handle(handle, torch.device("cuda", 0))
    inside = ("shape", "stride", "storage_offset", "storage_bytes")  # these are judged together
    said = str(caught.value)
    assert field in said or (field in inside and any(name in said for name in ("storage", *inside)))


def test_every_field_of_a_cuda_handle_is_made_wrong():
    assert set(CUDA_FIELDS) - set(WRONG_CUDA) == {"storage_class", "device_index", "requires_grad"}
