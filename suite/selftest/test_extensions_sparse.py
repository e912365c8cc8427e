"""Updates of what has changed are, bit by bit, whole ones; what missed one is never written over."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extensions import agreed, bracket, kept, patches, sparse
from extensions import changes as comparing
from extensions.bracket import UpdateError
from extensions.changes import SPARSE_SHARE
from extensions.elements import Found, integers
from extensions.group import GroupError
from extensions.group.basics import in_a_thread
from extensions.manifest import manifest_of
from extensions.model import load as loads
from extensions.model import places
from extensions.model.load import DirectLoad
from extensions.model.twin import named_tensors, record
from extensions.plan import Plan, _parameters
from extensions.sparse import SparseSender, SparseWorkerExtension
from suite.selftest.properties import examples
from suite.selftest.test_extensions_elements import examined
from suite.selftest.test_extensions_planned import WAIT_S, Wire

CPU, HALF = torch.device("cpu"), torch.bfloat16
RANKS = 2
SIZES = {
    "embed": (24, 8), "rows": (16, 8), "columns": (8, 16), "turned": (8, 6), "pair": (2, 4, 6), "norm": (8,),
    "wide": (12, 8), "cast": (4, 8), "scale": (8,), "elsewhere": (4, 4),
}  # fmt: skip
IN_PLACE = {"embed", "rows", "columns", "turned", "pair", "norm", "wide", "elsewhere"}
FLOATS = {"cast", "scale", "wide"}


class Shard(torch.nn.Module):
    """What a rank of two holds of SIZES: rows, columns and blocks of tensors, some turned, cast or computed."""

    def __init__(self, rank: int = 0, device: str = "cpu") -> None:
        super().__init__()
        self.rank = rank
        shapes = {
            "embed": (12, 8), "fused": (20, 8), "columns": (8, 8), "turned": (6, 8), "pair": (4, 1, 6), "norm": (8,),
            "cast": (4, 8), "scale": (8,),
        }  # fmt: skip
        for name, shape in (shapes | {"wide": (12, 4)}).items():
            dtype = torch.float32 if name == "wide" else HALF
            made = torch.zeros(shape, dtype=dtype, device=device)
            setattr(self, name, torch.nn.Parameter(made, requires_grad=False))

    def load_weights(self, named: Any) -> None:
        part = {size: slice(self.rank * size, (self.rank + 1) * size) for size in (1, 4, 8, 12)}
        for name, tensor in named:
            if name == "rows":
                self.fused.data[12:].copy_(tensor[part[8]])
            elif name == "embed":
                self.embed.data.copy_(tensor[part[12]])
                self.fused.data[:12].copy_(tensor[part[12]])
            elif name == "columns":
                self.columns.data.copy_(tensor[:, part[8]])
            elif name == "turned":
                self.turned.data.copy_(tensor.t())
            elif name == "pair":
                self.pair.data.copy_(tensor[part[1]].transpose(0, 1))
            elif name == "wide":
                self.wide.data.copy_(tensor[:, part[4]])
            elif name == "scale":
                self.scale.data.copy_(tensor)
                self.scale.data.copy_(-torch.exp(self.scale))
            elif name != "elsewhere":
                getattr(self, name).data.copy_(tensor)


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SIZES.items()}
    return {name: tensor if name in FLOATS else tensor.to(HALF) for name, tensor in made.items()}


MANIFEST = manifest_of(tensors_of(0).items())


def plan_of(model: Shard, _: object, announced: dict, whole: bool = True) -> Plan:
    twin = Shard(model.rank, "meta")
    parameters, tensors = _parameters(twin), {n: t.detach() for n, t in named_tensors(twin).items()}
    metas = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in announced.items()}
    return Plan(announced, record(twin, metas), parameters, tensors)


class Worker(SparseWorkerExtension):
    """As much of vLLM's worker as the extension touches."""

    device, vllm_config = CPU, None

    def __init__(self, rank: int, wire: Wire) -> None:
        self.rank, self.model, self._weight_sync_group = rank, Shard(rank), wire
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)


class Engine:
    """A sender and the workers of two ranks, each in a thread of its own while an update moves."""

    def __init__(self, worker: type = Worker, sender: type = SparseSender) -> None:
        self.sender = object.__new__(sender)
        self.sender._group, *wires = Wire.ranks(1 + RANKS)
        self.workers = [worker(rank, wire) for rank, wire in enumerate(wires)]
        self.digests = [one.plan_update(MANIFEST) for one in self.workers]

    def update(self, tensors: dict[str, torch.Tensor], manifest: list | None = MANIFEST) -> int:
        """What the sender has sent, in bytes. Raises what a worker raises, or else the sender."""
        calls = [in_a_thread(lambda: self.sender.send(tensors.items(), manifest))]
        for one, digest in zip(self.workers, self.digests, strict=True):
            calls.append(in_a_thread(functools.partial(one.receive_update, digest)))
        futures.wait(calls, WAIT_S)
        for call in calls[1:]:
            call.result(0)
        return calls[0].result(0)

    def expect(self, tensors: dict[str, torch.Tensor]) -> None:
        """Every rank has, bit by bit, what a whole load leaves there."""
        for worker in self.workers:
            expected = Shard(worker.rank)
            expected.load_weights(tensors.items())
            for name, parameter in expected.named_parameters():
                found = getattr(worker.model, name)
                assert torch.equal(integers(found.data), integers(parameter.data)), f"{name} on rank {worker.rank}"


class OneAtATime:
    """What is tested of `test_extensions_elements.examined`: Triton's interpreter takes no two threads at once."""

    def __init__(self) -> None:
        self._elements, self._lock = examined(), threading.Lock()

    def changed(self, *given: Any) -> Found | None:
        with self._lock:
            return self._elements.changed(*given)

    def write(self, *given: Any) -> torch.Tensor:
        with self._lock:
            return self._elements.write(*given)


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    one = OneAtATime()
    monkeypatch.setattr(sparse, "elements_on", lambda device: one)
    monkeypatch.setattr(loads, "configured", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(kept, "accepted", plan_of)
    for module in (bracket, places):
        monkeypatch.setattr(module, "processed_layers", lambda model: [])
    monkeypatch.setattr(places, "is_attention", lambda layer: False)
    monkeypatch.setattr(bracket, "new_load", DirectLoad)
    monkeypatch.setattr(sparse, "partial_load", DirectLoad)


def flipped(tensors: dict[str, torch.Tensor], bits: dict[str, dict[int, int]]) -> dict[str, torch.Tensor]:
    """A copy of tensors, with some bits of some elements turned: {name: {position: which bits}}."""
    made = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, elements in bits.items():
        flat = integers(made[name])
        for position, turned in elements.items():
            flat[position] ^= turned
    return made


def is_whole(sent_bytes: int) -> bool:
    return sent_bytes >= sum(tensor.nbytes for tensor in tensors_of(0).values())


@st.composite
def steps(draw: st.DrawFn) -> list[dict[str, dict[int, int]]]:
    """What each of some steps changes: few elements or many, of few tensors or all."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from([*SIZES]), unique=True, max_size=len(SIZES)))
        sizes = {name: math.prod(SIZES[name]) for name in names}
        found.append(
            {
                name: draw(st.dictionaries(st.integers(0, size - 1), st.integers(1, 2**15 - 1), max_size=size // 3))
                for name, size in sizes.items()
            }
        )
    return found


@examples(0.5)
@given(steps(), st.integers(1, 9), st.sampled_from((1, 200, 2**20)))
def test_changes_are_bit_by_bit_what_a_whole_update_would_be(
    changes: list[dict[str, dict[int, int]]], chunk: int, run_bytes: int
):
    engine, tensors = Engine(), tensors_of(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patches, "CHUNK_ELEMENTS", chunk)
        patched.setattr(comparing, "RUN_BYTES", dict.fromkeys(("cpu", "cuda"), run_bytes))
        engine.update(tensors)
        engine.expect(tensors)
        for bits in changes:
            tensors = flipped(tensors, bits)
            engine.update(tensors)
            engine.expect(tensors)
            assert all(worker.update_state() == "ready" for worker in engine.workers)


def changed_once(engine: Engine, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return flipped(tensors, {"rows": {5: 0x8000 - 2**16, 77: 1}, "turned": {47: 2}, "wide": {0: 1}})


def test_what_has_not_changed_is_not_sent():
    engine, tensors = Engine(), tensors_of(1)
    assert is_whole(engine.update(tensors))
    counts = 8 * len(SIZES)
    assert engine.update(tensors) == counts
    few = changed_once(engine, tensors)
    assert engine.update(few) == counts + 3 * (4 + 2) + (4 + 4)
    engine.expect(few)
    assert engine.sender._units == [-1 if name in IN_PLACE else index for index, name in enumerate(SIZES)]
    computed = flipped(few, {"scale": {0: 1}})
    assert engine.update(computed) == counts + few["scale"].nbytes
    engine.expect(computed)


def test_where_too_much_has_changed_the_update_is_whole():
    engine, tensors = Engine(), tensors_of(1)
    whole = engine.update(tensors)
    room = int(SPARSE_SHARE * whole) // (4 + 2)
    names = [name for name in IN_PLACE if name != "wide"]
    every = [(name, position) for name in names for position in range(math.prod(SIZES[name]))]
    assert len(every) > room
    for count, is_sparse in ((room, True), (room + 1, False)):
        bits: dict[str, dict[int, int]] = {}
        for name, position in every[:count]:
            bits.setdefault(name, {})[position] = 1
        tensors = flipped(tensors, bits)
        assert is_whole(engine.update(tensors)) != is_sparse
        engine.expect(tensors)


def test_numbers_that_compare_as_equal_are_told_apart():
    engine, tensors = Engine(), tensors_of(1)
    tensors["norm"][:3] = torch.tensor([0.0, float("nan"), 1.0])
    engine.update(tensors)
    others = flipped(tensors, {"norm": {0: -(2**15), 1: 0x15}})  # -0, and a NaN with another payload
    assert engine.update(others) == 8 * len(SIZES) + 2 * (4 + 2)
    engine.expect(others)


# ---- a worker that has other weights than were compared


def slept(engine: Engine) -> None:
    """Its memory was given up, and is there again with nothing in it."""
    for parameter in engine.workers[1].model.parameters():
        parameter.data.zero_()


def was_updated_otherwise(engine: Engine) -> None:
    for worker in engine.workers:
        worker.begin_update(MANIFEST)
        worker._weight_sync_accept(tensors_of(9))
        worker.end_update()


def got_a_tensor_alone(engine: Engine) -> None:
    engine.workers[0]._weight_sync_accept({"norm": tensors_of(9)["norm"]})


def missed_one(engine: Engine) -> None:
    """The worker of one rank failed in an update that the other has had."""
    worker = engine.workers[1]
    worker._weight_sync_group.breaks_after = worker._weight_sync_group.groups + 4  # what all ranks say, and the counts
    with pytest.raises(GroupError):
        engine.update(flipped(tensors_of(1), {"norm": {3: 1}}))
    assert [one.update_state() for one in engine.workers] == ["ready", "inconsistent"]
    worker._weight_sync_group.breaks_after = math.inf
    worker._weight_sync_group.sent[0, 2].get(timeout=WAIT_S)  # what did not arrive


def was_started_anew(engine: Engine) -> None:
    engine.workers[1] = type(engine.workers[1])(1, engine.workers[1]._weight_sync_group)
    engine.digests[1] = engine.workers[1].plan_update(MANIFEST)


def has_moved(engine: Engine) -> None:
    model = engine.workers[0].model
    model.embed = torch.nn.Parameter(torch.zeros_like(model.embed), requires_grad=False)
    engine.digests[0] = engine.workers[0].plan_update(MANIFEST)


def heard_of_an_update_that_was_refused(engine: Engine) -> None:
    wrong = tensors_of(2) | {"norm": tensors_of(2)["norm"][:-1]}
    with pytest.raises(UpdateError, match="rank 0 refuses the update"):
        engine.update(wrong)


WAYS = (
    slept, was_updated_otherwise, got_a_tensor_alone, missed_one, was_started_anew, has_moved,
    heard_of_an_update_that_was_refused,
)  # fmt: skip


def expect_whole_after(way: Callable[[Engine], None], engine: Engine) -> None:
    tensors = tensors_of(1)
    engine.update(tensors)
    way(engine)
    few = changed_once(engine, tensors)
    assert is_whole(engine.update(few)), "expected a whole update"
    engine.expect(few)
    assert not is_whole(engine.update(tensors))
    engine.expect(tensors)


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_has_other_weights_is_sent_all(way: Callable[[Engine], None]):
    expect_whole_after(way, Engine())


class PatchesWhateverIsThere(Worker):
    """Says that it has the weights of its last update, whatever has become of them: broken on purpose."""

    def receive_update(self, digest: str) -> int:
        moved = super().receive_update(digest)
        self.kept = self._weight_sync_held
        return moved

    def _weight_sync_version(self, agreed: agreed.Agreed) -> bytes:
        return self.kept.version if hasattr(self, "kept") else sparse.NO_VERSION


@pytest.mark.parametrize("way", [slept, was_updated_otherwise, got_a_tensor_alone, has_moved])
def test_a_worker_that_patches_whatever_is_there_is_found(way: Callable[[Engine], None]):
    with pytest.raises(AssertionError):
        expect_whole_after(way, Engine(PatchesWhateverIsThere))


# ---- what the sender has compared


def test_what_was_compared_is_what_is_sent():
    engine, tensors = Engine(), tensors_of(1)
    engine.update(tensors)
    few = changed_once(engine, tensors)
    live = {name: tensor.clone() for name, tensor in few.items()}
    assert engine.sender.compare(live.items(), MANIFEST) == 4
    for tensor in live.values():
        tensor.zero_()  # the next step of the optimiser
    assert not is_whole(engine.update(live))
    engine.expect(few)


def test_what_was_compared_and_not_sent_is_not_lost():
    engine, tensors = Engine(), tensors_of(1)
    engine.update(tensors)
    few = changed_once(engine, tensors)
    engine.sender.compare(few.items(), MANIFEST)
    assert engine.sender.compare(few.items(), MANIFEST) is None
    assert is_whole(engine.update(few))
    engine.expect(few)


def test_a_sender_that_has_forgotten_sends_all():
    engine, tensors = Engine(), tensors_of(1)
    engine.update(tensors)
    engine.sender.forget()
    assert is_whole(engine.update(changed_once(engine, tensors)))
    engine.expect(changed_once(engine, tensors))


def test_the_sender_makes_the_manifest_itself_where_none_is_given():
    engine, tensors = Engine(), tensors_of(1)
    for sent in (tensors, changed_once(engine, tensors)):
        engine.update(sent, None)
        engine.expect(sent)
