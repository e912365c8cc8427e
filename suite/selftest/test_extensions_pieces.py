"""Updates are cut alike on both sides, and what passes through a receiver's buffer is bounded whatever the tensors."""

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from extensions import bracket, kept, planned
from extensions.bracket import Update
from extensions.group.basics import in_a_thread
from extensions.manifest import Announced, manifest_of
from extensions.model import load as loads
from extensions.model.load import DirectLoad, LoadError
from extensions.model.regions import memory_id, overlaps, part, region_of
from extensions.model.twin import named_tensors, record
from extensions.pieces import (
    ALIGNMENT_BYTES,
    GROUP_BYTES,
    GROUP_PIECES,
    STAGED_BYTES,
    Groups,
    aligned,
    cut,
    room_for,
    whole,
)
from extensions.plan import Plan, _parameters
from extensions.planned import PlannedSender, PlannedWorkerExtension
from extensions.staging import Staging
from suite.processes.local import ADDRESS, free_port
from suite.selftest import fakes

CPU, HALF = torch.device("cpu"), torch.bfloat16
SMALL_BYTES = 16 * ALIGNMENT_BYTES  # in the place of STAGED_BYTES
SLACK_BYTES = 4096  # digests, and what comparing and casting takes for tensors of this size
DEADLINE_S = 30


# ---- how an update is cut


@st.composite
def announcements(draw: st.DrawFn) -> Announced:
    sizes = draw(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
    dtypes = st.sampled_from((torch.uint8, HALF, torch.float32))
    return {f"tensor {index}": (draw(dtypes), (size,)) for index, size in enumerate(sizes)}


def expect_all_in_order(groups: Groups, announced: Announced) -> None:
    pieces = [piece for group in groups for piece in group]
    assert all(groups), "expected no empty group"
    assert [*dict.fromkeys(piece.name for piece in pieces)] == [*announced]
    for name, (dtype, (size,)) in announced.items():
        own, reached = [piece for piece in pieces if piece.name == name], 0
        for piece in own:
            assert piece.start == reached
            assert piece.start % ALIGNMENT_BYTES == 0
            reached += piece.nbytes
        assert [piece.is_last for piece in own] == [False] * (len(own) - 1) + [True]
        assert reached == own[0].total == size * dtype.itemsize


@given(announcements(), st.integers(1, 4).map(lambda blocks: blocks * ALIGNMENT_BYTES))
def test_pieces_are_the_whole_update_and_fit_into_the_buffer(announced: Announced, limit: int):
    groups = cut(announced, limit)
    expect_all_in_order(groups, announced)
    assert room_for(groups, lambda piece: True) <= limit


@given(announcements(), st.integers(1, 20000))
def test_groups_of_whole_tensors_are_as_large_as_they_may_be(announced: Announced, limit: int):
    groups = whole(announced, limit)
    expect_all_in_order(groups, announced)
    sizes = [sum(piece.nbytes for piece in group) for group in groups]
    assert all(piece.is_whole for group in groups for piece in group)
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    after = [group[0].nbytes for group in groups[1:]]
    assert all(size + more > limit for size, more in zip(sizes, after, strict=False)), "expected no group to have room"


@pytest.mark.parametrize("divide", [whole, cut])
def test_a_group_has_no_more_pieces_than_nccl_takes(divide: Callable[[Announced, int], list]):
    announced = {f"scale {index}": (torch.float32, (1,)) for index in range(2 * GROUP_PIECES + 1)}
    groups = divide(announced, GROUP_BYTES)
    expect_all_in_order(groups, announced)
    assert [*map(len, groups)] == [GROUP_PIECES, GROUP_PIECES, 1]


def test_the_buffer_is_small_and_the_groups_are_large():
    assert STAGED_BYTES + 3 * loads.COMPARED_BYTES < 64 * 2**20
    assert STAGED_BYTES % ALIGNMENT_BYTES == 0
    assert GROUP_BYTES >= 256 * 2**20
    assert [aligned(nbytes) for nbytes in (0, 1, ALIGNMENT_BYTES)] == [0, ALIGNMENT_BYTES, ALIGNMENT_BYTES]


# ---- what of a copy lies in a piece


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous tensor of different values, and a part of it, perhaps transposed."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    source = torch.arange(torch.Size(shape).numel()).reshape(shape).to(torch.int32)
    view = source
    for _ in range(draw(st.integers(0, 3))):
        dim = draw(st.integers(0, view.dim() - 1))
        first = draw(st.integers(0, view.shape[dim] - 1))
        view = view.narrow(dim, first, draw(st.integers(1, view.shape[dim] - first)))
        if draw(st.booleans()):
            view = view.transpose(0, dim)
    return source, view


@given(views(), st.lists(st.integers(0, 625), max_size=4), st.booleans())
def test_a_copy_in_pieces_is_the_copy(viewed: tuple[torch.Tensor, torch.Tensor], cuts: list[int], turned: bool):
    source, view = viewed
    wanted = torch.full(view.shape[::-1], -1.0) if turned else torch.full(view.shape, -1.0)
    into = wanted.permute(*reversed(range(view.dim()))) if turned else wanted
    found, target = wanted.clone(), region_of(into)
    into.copy_(view)
    bounds, copied = sorted({0, source.numel(), *(min(one, source.numel()) for one in cuts)}), 0
    for start, end in itertools.pairwise(bounds):
        piece = source.reshape(-1)[start:end].clone()
        for read, write in overlaps(region_of(view), target, 4 * start, 4 * end):
            part(found, write).copy_(part(piece, read))
            copied += read.elements
    assert torch.equal(found, wanted)
    assert copied == view.numel(), "expected every element once"


# ---- a rank of two, without vLLM

SIZES = {
    "embed": (192, 64), "rows": (256, 64), "columns": (64, 256), "turned": (64, 48), "norm": (64,), "cast": (128, 64),
    "elsewhere": (64, 64), "head": (192, 64),
}  # fmt: skip


class Shard(torch.nn.Module):
    """What one rank of two holds of SIZES, whose `load_weights` takes whole tensors. Views are read at once."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        shapes = {"embed": (96, 64), "rows": (128, 64), "columns": (64, 128), "turned": (48, 64), "norm": (64,)}
        for name, shape in (shapes | {"cast": (128, 64)}).items():
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape, dtype=HALF, device=device), requires_grad=False))

    def load_weights(self, named: Any) -> None:
        for name, tensor in named:
            mine = {
                "embed": lambda t: t[96:], "rows": lambda t: t[128:], "columns": lambda t: t[:, 128:],
                "turned": lambda t: t.t(), "norm": lambda t: t, "cast": lambda t: t,
            }.get(name)  # fmt: skip
            if mine is not None:
                getattr(self, name).data.copy_(mine(tensor))


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SIZES.items()}
    made["head"] = made["embed"]
    return {name: tensor if name == "cast" else tensor.to(HALF) for name, tensor in made.items()}


MANIFEST = manifest_of(tensors_of(0).items())


def plan_of(announced: Announced) -> Plan:
    twin = Shard("meta")
    parameters, tensors = _parameters(twin), {n: t.detach() for n, t in named_tensors(twin).items()}
    metas = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in announced.items()}
    fills = record(twin, {name: tensor for name, tensor in metas.items() if name != "head"})
    return Plan(announced, fills, parameters, tensors, aliases={"head": "embed"} if "head" in announced else {})


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "configured", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(kept, "accepted", lambda model, config, announced, whole=True: plan_of(announced))
    monkeypatch.setattr(bracket, "processed_layers", lambda model: [])
    monkeypatch.setattr(bracket, "new_load", DirectLoad)


def received(tensors: dict[str, torch.Tensor]) -> Shard:
    """A shard that was sent the tensors in pieces, by one process."""
    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    model = Shard()
    update = Update(DirectLoad(model, None, plan_of(announced)), announced)
    staging = Staging(update, CPU, SMALL_BYTES)
    for group in cut(announced, SMALL_BYTES):
        for piece, place in zip(group, staging.places(group), strict=True):
            sent = tensors[piece.name].reshape(-1).view(torch.uint8)[piece.start : piece.start + piece.nbytes]
            place.reshape(-1).view(torch.uint8).copy_(sent)
        staging.settle(group)
    assert update.missing() == []
    update.load.end()
    return model


def expect_loaded(model: Shard, tensors: dict[str, torch.Tensor]) -> None:
    expected = Shard()
    expected.load_weights(tensors.items())
    for name, parameter in expected.named_parameters():
        assert torch.equal(getattr(model, name), parameter), f"expected {name} as load_weights makes it"


def test_a_shard_is_what_load_weights_makes_of_whole_tensors():
    expect_loaded(received(tensors_of(1)), tensors_of(1))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("element", [95 * 64, 96 * 64, 192 * 64 - 1])
def test_a_tied_head_is_compared_in_pieces_as_far_as_it_is_here(first: bool, element: int):
    sent = tensors_of(1)
    sent["head"] = sent["head"].clone()
    sent["head"].view(-1)[element] += 1
    if first:
        sent = {"head": sent["head"]} | sent
    if element < 96 * 64:
        expect_loaded(received(sent), sent)  # the other rank has it
        return
    with pytest.raises(LoadError, match=r"^head: its values are not those of embed"):
        received(sent)


# ---- the bound, over gloo


class Allocations(TorchDispatchMode):
    """Counts the bytes of the memory that operations make and that is still there: now, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.most_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        before = {memory_id(tensor) for tensor in given} | self._known
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and memory_id(tensor) not in before:
                self._made(memory_id(tensor), tensor.untyped_storage())
        return result

    def _made(self, memory: int, storage: torch.UntypedStorage) -> None:
        self._known.add(memory)
        self.now_bytes += storage.nbytes()
        self.most_bytes = max(self.most_bytes, self.now_bytes)
        weakref.finalize(storage, self._freed, memory, storage.nbytes())

    def _freed(self, memory: int, nbytes: int) -> None:
        self._known.discard(memory)
        self.now_bytes -= nbytes


class Receiving(PlannedWorkerExtension):
    """A worker of rank 1 with a Shard for its model."""

    rank, device, vllm_config, _weight_sync_staged_bytes = 0, CPU, fakes.VLLM_CONFIG, SMALL_BYTES

    def __init__(self) -> None:
        self.model = Shard()
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)

    def receive_counted(self, digest: str) -> Allocations:
        """Receive an update, and return what it took beside the model, and what it left. Other threads don't count."""
        with Allocations() as allocations:
            self.receive_update(digest)
        return allocations


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Receiving, PlannedSender]]:
    """A worker and a sender that have met over gloo, and cut what does not fit into SMALL_BYTES."""
    monkeypatch.setattr(loads, "COMPARED_BYTES", ALIGNMENT_BYTES)
    worker, port = Receiving(), free_port()
    joining = in_a_thread(lambda: worker.init_weight_update_group(ADDRESS, port, 1, 2))
    sender = PlannedSender(ADDRESS, port, 2, "cpu", DEADLINE_S, DEADLINE_S)
    joining.result(DEADLINE_S)
    sender._staged_bytes = SMALL_BYTES
    yield worker, sender
    worker.close_weight_update_group()
    sender.close()


def test_what_a_rank_holds_beside_its_shard_is_bounded(connected: tuple[Receiving, PlannedSender]):
    whole_bytes = sum(tensor.nbytes for tensor in tensors_of(0).values())
    assert whole_bytes > 10 * SMALL_BYTES
    worker, sender = connected
    digest = worker.plan_update(MANIFEST)
    for seed in (1, 2):
        receiving = in_a_thread(lambda: worker.receive_counted(digest))
        assert sender.send(tensors_of(seed).items(), MANIFEST) == whole_bytes
        found = receiving.result(DEADLINE_S)
        assert SMALL_BYTES <= found.most_bytes <= SMALL_BYTES + SLACK_BYTES
        until_s = time.monotonic() + DEADLINE_S
        while found.now_bytes > SLACK_BYTES and time.monotonic() < until_s:
            time.sleep(0.01)  # gloo's thread lets go of what it has received last
        assert found.now_bytes <= SLACK_BYTES
        expect_loaded(worker.model, tensors_of(seed))


def test_an_update_that_failed_leaves_nothing_to_the_next(connected: tuple[Receiving, PlannedSender]):
    worker, sender = connected
    digest = worker.plan_update(MANIFEST)
    right, wrong = tensors_of(1), tensors_of(1)
    wrong["head"] = -wrong["head"]
    for sent in (right, wrong, right):
        receiving = in_a_thread(lambda: worker.receive_update(digest))
        sender.send(sent.items(), MANIFEST)
        if sent is wrong:
            with pytest.raises(LoadError, match=r"^head: its values"):
                receiving.result(DEADLINE_S)
            assert worker.update_state() == "inconsistent"
        else:
            assert receiving.result(DEADLINE_S) == len(MANIFEST)
            assert worker.update_state() == "ready"
            expect_loaded(worker.model, right)


def test_a_rank_that_needs_no_pieces_takes_those_that_another_needs(
    connected: tuple[Receiving, PlannedSender], monkeypatch: pytest.MonkeyPatch
):
    worker, sender = connected
    agreed_by_two = planned.agree
    monkeypatch.setattr(planned, "agree", lambda *said, **how: agreed_by_two(*said, **how) or True)
    worker._weight_sync_staged_bytes = sender._staged_bytes = 2**16
    worker._weight_sync_group_bytes = 1
    digest = worker.plan_update(MANIFEST)
    assert worker._weight_sync_agreed.beside_bytes < 2**16, "expected pieces of more tensors than groups have"
    receiving = in_a_thread(lambda: worker.receive_update(digest))
    sender.send(tensors_of(1).items(), MANIFEST)
    assert receiving.result(DEADLINE_S) == len(MANIFEST)
    expect_loaded(worker.model, tensors_of(1))
