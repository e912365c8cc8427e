"""Planned updates go straight to where the plan says, and whatever does not fit them touches nothing."""

import contextlib
import functools
import math
import queue
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions import bracket, copying, kept, planned
from extensions.agreed import digest_of
from extensions.bracket import UpdateError
from extensions.group import GroupError
from extensions.group.basics import in_a_thread
from extensions.manifest import ManifestError, manifest_of, parse
from extensions.model import load as loads
from extensions.model.load import DirectLoad
from extensions.planned import PlannedSender, PlannedWorkerExtension
from extensions.planned_colocate import KeptHandleSender, PlannedColocateWorkerExtension
from extensions.tensors import flat_bytes
from suite.selftest.test_extensions_load import NEW, Live, plan_for

CPU = torch.device("cpu")
WAIT_S = 5.0
MANIFEST = manifest_of(NEW.items())


class Wire:
    """A rank of a group in one process: what a rank broadcasts waits for each of the others."""

    def __init__(self, rank: int, sent: dict[tuple[int, int], queue.Queue]) -> None:
        self.rank, self.sent, self.device = rank, sent, CPU
        self.world_size = math.isqrt(len(sent))
        self.into: list[torch.Tensor] = []
        self.groups, self.breaks_after, self.aborted = 0, math.inf, ""

    @staticmethod
    def ranks(count: int) -> list["Wire"]:
        sent = {(src, rank): queue.Queue() for src in range(count) for rank in range(count)}
        return [Wire(rank, sent) for rank in range(count)]

    def broadcast_all(self, tensors: list[torch.Tensor], src: int) -> None:
        self.groups += 1
        if self.groups > self.breaks_after:
            raise GroupError("rank 0 is gone")
        if src == self.rank:
            for rank in range(self.world_size):
                self.sent[src, rank].put([flat_bytes(tensor).clone() for tensor in tensors])
            return
        self.into += tensors
        for mine, theirs in zip(tensors, self.sent[src, self.rank].get(timeout=WAIT_S), strict=True):
            flat_bytes(mine).copy_(theirs)

    def wait(self) -> None: ...

    def abort(self, reason: str) -> None:
        self.aborted = reason


class Worker(PlannedColocateWorkerExtension, PlannedWorkerExtension):
    """As much of vLLM's worker as the extensions touch."""

    rank, device, vllm_config = 0, CPU, None

    def __init__(self) -> None:
        self.model = Live()
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.sender = object.__new__(PlannedSender)
        self.sender._group, self.wire = Wire.ranks(2)
        self._weight_sync_group = self.wire

    def receive(self, call: Callable[[], int], tensors: dict, manifest: list | None = MANIFEST) -> int:
        """What the worker's call returns while the sender sends, and what the sender does: bytes, or its error."""
        sent = in_a_thread(lambda: self.sender.send(tensors.items(), manifest))
        received = in_a_thread(call)
        futures.wait([sent, received], WAIT_S)
        self.heard = sent.exception(0) or sent.result()
        return received.result(0)

    def update(self, digest: str, tensors: dict, manifest: list | None = MANIFEST) -> int:
        return self.receive(lambda: self.receive_update(digest), tensors, manifest)


def accepted(model: Live, _: object, announced: dict, whole: bool = True) -> Any:
    if whole and announced != parse(MANIFEST):
        raise ManifestError("the update does not fit the model")
    return plan_for(model)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(loads, "configured", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(kept, "accepted", accepted)
    monkeypatch.setattr(bracket, "processed_layers", lambda model: [])
    monkeypatch.setattr(bracket, "new_load", DirectLoad)
    return Worker()


def changed(by: float) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in NEW.items()}


def expect_loaded(model: Live, tensors: dict[str, torch.Tensor]) -> None:
    expected = Live()
    expected.load_weights(tensors.items())
    for found, wanted in ((model.inner.rows, expected.inner.rows), (model.scale, expected.scale)):
        assert torch.equal(found, wanted)
    assert torch.equal(model.shown, expected.shown), "expected views to be renewed"


def untouched(worker: Worker) -> bool:
    return not worker.model.inner.rows.any() and not worker.model.scale.any() and worker.update_state() == "ready"


def test_what_is_copied_as_it_is_is_received_in_place_and_the_rest_beside(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    rows = worker.model.inner.rows
    for by in (0, 1, 2):
        worker.wire.into.clear()
        assert worker.update(digest, changed(by)) == len(NEW)
        assert worker.heard == sum(t.nbytes for t in NEW.values())
        expect_loaded(worker.model, changed(by))
        addresses = [tensor.data_ptr() for tensor in worker.wire.into[1:]]
        assert addresses[:2] == [rows[:3].data_ptr(), rows[3:].data_ptr()]
        assert addresses[2] != worker.model.scale.data_ptr(), "load_weights does more than copy it"
    assert worker.update_state() == "ready"


def test_a_load_is_used_again_as_if_it_were_new_unless_it_holds_tensors(worker: Worker):
    load = DirectLoad(worker.model, None, plan_for(worker.model))
    load.load(NEW)
    assert not load.abort()
    assert load.again() is load
    assert load.abort(), "expected nothing to be touched yet"
    load._heads["lm_head.weight"] = NEW["upper"]
    assert load.again() is None


def test_the_sender_makes_the_manifest_itself_where_none_is_given(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    for by in (0, 1):
        worker.update(digest, changed(by), None)
    expect_loaded(worker.model, changed(1))


def test_another_update_than_was_planned_touches_nothing_and_both_sides_say_so(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    with pytest.raises(UpdateError, match=f"expected the update {digest[:12]}, the sender sends "):
        worker.update(digest, {"upper": NEW["upper"]}, None)
    assert untouched(worker)
    assert isinstance(worker.heard, UpdateError)
    assert f"the worker of rank 1 expects {digest[:12]}" in str(worker.heard)
    worker.update(digest, NEW)  # by the same group
    expect_loaded(worker.model, NEW)


@pytest.mark.parametrize("refusing", [1, 2])
def test_where_one_worker_refuses_no_rank_touches_anything(worker: Worker, refusing: int):
    workers = [worker, Worker()]
    sender, worker._weight_sync_group, workers[1]._weight_sync_group = Wire.ranks(3)
    worker.sender._group = sender
    digests = [one.plan_update(MANIFEST) for one in workers]

    def moved(digests: list[str]) -> list[futures.Future]:
        calls = [in_a_thread(lambda: worker.sender.send(NEW.items(), MANIFEST))]
        for one, digest in zip(workers, digests, strict=True):
            calls.append(in_a_thread(functools.partial(one.receive_update, digest)))
        futures.wait(calls, WAIT_S)
        return calls

    refused = moved(["abcdef" if rank == refusing else digests[0] for rank in (1, 2)])
    errors = [str(call.exception(0)) for call in refused]
    assert "expected the plan abcdef" in errors.pop(refusing)
    assert all(f"rank {refusing} refuses the update" in error for error in errors)
    assert all(map(untouched, workers))
    assert [call.result(0) for call in moved(digests)][1:] == [len(NEW)] * 2


@pytest.mark.parametrize("another", [False, True])
def test_an_update_that_was_not_planned_touches_nothing(worker: Worker, another: bool):
    if another:
        worker.plan_update(MANIFEST)
    found = "found none" if not another else "found [0-9a-f]{12}"
    with pytest.raises(UpdateError, match=rf"expected the plan abcdef, {found}: call plan_update"):
        worker.update("abcdef", NEW)
    assert untouched(worker)
    assert isinstance(worker.heard, UpdateError)
    assert "rank 1 refuses the update" in str(worker.heard)


def test_a_plan_from_before_the_models_tensors_moved_is_void(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    worker.update(digest, NEW)
    old = worker.model.inner.rows
    worker.model.inner.rows = torch.nn.Parameter(old.data.clone(), requires_grad=False)
    worker.begin_update(MANIFEST)  # which plans anew
    worker.abort_update()
    with pytest.raises(UpdateError, match="have moved since the update was planned: call plan_update"):
        worker.update(digest, changed(1))
    for rows in (old, worker.model.inner.rows):
        assert torch.equal(rows[:3], NEW["upper"])
    assert worker.plan_update(MANIFEST) == digest
    worker.update(digest, changed(1))
    assert torch.equal(worker.model.inner.rows[:3], changed(1)["upper"])


def test_a_broadcast_that_breaks_off_leaves_an_inconsistent_model(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    worker.wire.breaks_after = 2  # what both ranks say
    with pytest.raises(GroupError, match="rank 0 is gone"):
        worker.update(digest, NEW)
    assert worker.update_state() == "inconsistent"
    worker.wire.breaks_after = math.inf
    worker.wire.sent[0, 1].get(timeout=WAIT_S)  # what did not arrive
    worker.update(digest, NEW)
    assert worker.update_state() == "ready"
    expect_loaded(worker.model, NEW)


def test_a_sender_with_another_tensor_than_announced_gives_the_group_up(worker: Worker, monkeypatch):
    monkeypatch.setattr(planned, "agree", lambda *_, **__: False)
    for wrong in (NEW | {"lower": NEW["lower"].float()}, {"upper": NEW["upper"]}):
        with pytest.raises(ValueError, match=r"expected lower as in the manifest, found (lower float32|nothing)"):
            worker.sender.send(wrong.items(), MANIFEST)
        assert "expected lower as in the manifest" in worker.sender._group.aborted


def test_a_sender_whose_tensors_break_off_gives_the_group_up(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    """Else the workers would take what it sends next for the rest of this update."""
    monkeypatch.setattr(planned, "agree", lambda *_, **__: False)

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(NEW.items()))
        raise MemoryError("no room to gather the next")

    with pytest.raises(MemoryError):
        worker.sender.send(gathered(), MANIFEST)
    assert "MemoryError: no room to gather the next" in worker.sender._group.aborted


def test_a_tensor_that_was_not_announced_is_named(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    assert worker.update(digest, NEW | {"ghost": NEW["upper"]}) == len(NEW)
    assert isinstance(worker.heard, ValueError)
    assert "ghost is not in the manifest: it was not sent" in str(worker.heard)
    expect_loaded(worker.model, NEW)


def test_a_manifest_that_does_not_fit_leaves_what_was_planned(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    with pytest.raises(ManifestError):
        worker.plan_update(MANIFEST[:1])
    worker.update(digest, NEW)
    expect_loaded(worker.model, NEW)


def test_an_update_under_way_is_not_disturbed(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    worker.begin_update(MANIFEST)
    for call in (lambda: worker.plan_update(MANIFEST), lambda: worker.update(digest, NEW)):
        with pytest.raises(UpdateError, match="an update is under way"):
            call()
    assert worker.update_state() == "updating"


def test_tensors_alone_are_received_by_one_call(worker: Worker):
    alone = {"upper": NEW["upper"]}
    assert worker.receive(lambda: worker.receive_alone(manifest_of(alone.items())), alone, None) == 1
    assert torch.equal(worker.model.inner.rows[:3], NEW["upper"])
    assert not worker.model.inner.rows[3:].any()


def test_large_updates_go_in_groups(monkeypatch: pytest.MonkeyPatch, worker: Worker):
    monkeypatch.setattr(PlannedWorkerExtension, "_weight_sync_group_bytes", 1)
    monkeypatch.setattr(PlannedSender, "_group_bytes", 1)
    worker.update(worker.plan_update(MANIFEST), NEW)
    assert worker.wire.groups == 2 + len(NEW)
    expect_loaded(worker.model, NEW)


@pytest.mark.parametrize("fails_at", ["begin", "upper", "converted"])
def test_a_worker_that_breaks_off_gives_up_the_group_it_is_out_of_step_with(
    monkeypatch: pytest.MonkeyPatch, worker: Worker, fails_at: str
):
    class Fails(DirectLoad):
        def begin(self) -> None:
            if fails_at == "begin":
                raise MemoryError("no room to begin")

        def place(self, name: str) -> torch.Tensor | None:
            if fails_at == name and armed:
                raise MemoryError("no room to place")
            return super().place(name)

        def load(self, tensors: dict[str, torch.Tensor]) -> None:
            raise MemoryError("no room to load")

    armed = False
    monkeypatch.setattr(bracket, "new_load", Fails)
    monkeypatch.setattr(PlannedWorkerExtension, "_weight_sync_group_bytes", 1)
    monkeypatch.setattr(PlannedSender, "_group_bytes", 1)
    digest, armed = worker.plan_update(MANIFEST), True
    with pytest.raises(MemoryError):
        worker.update(digest, NEW)
    # What load_weights converts comes last here: all was received then, and the group serves the next update.
    expected = "" if fails_at == "converted" else "rank 1 broke off the update: MemoryError: no room to"
    assert worker.wire.aborted.startswith(expected)
    assert bool(worker.wire.aborted) == bool(expected)


def test_a_digest_tells_names_dtypes_shapes_and_their_order():
    entry = {"name": "a", "dtype": "bfloat16", "shape": [2, 3]}
    changes = [{"name": "b"}, {"dtype": "float16"}, {"shape": [3, 2]}]
    two = [entry, entry | {"name": "z"}]
    manifests = [[entry], *([entry | change] for change in changes), two, two[::-1]]
    assert len({digest_of(parse(manifest)) for manifest in manifests}) == len(manifests)


# ---- by handles


def copied(worker: Worker, sender: KeptHandleSender, digest: str, tensors: dict[str, torch.Tensor], known: str) -> str:
    """One update; the worker is sent the handles unless it has those that are called `known`."""
    handles = sender.handles(tensors.items())
    worker.copy_update(digest, sender.opened, {} if sender.opened == known else handles)
    return sender.opened


@pytest.mark.parametrize("large_bytes", [1, 2**20])
def test_handles_are_opened_once(worker: Worker, monkeypatch: pytest.MonkeyPatch, large_bytes: int):
    monkeypatch.setattr(copying, "LARGE_BYTES", large_bytes)
    digest, sender, opened = worker.plan_update(MANIFEST), KeptHandleSender(CPU), ""
    for by in (0, 1, 2):
        opened = copied(worker, sender, digest, changed(by), opened)
        expect_loaded(worker.model, changed(by))
        monkeypatch.setattr("extensions.planned_colocate.opened_handle", None)  # no later update opens any
    sender.release()


def test_a_worker_says_when_the_parts_of_an_update_were_over(worker: Worker):
    digest, sender = worker.plan_update(MANIFEST), KeptHandleSender(CPU)
    assert worker.update_times() == {}
    began = time.monotonic()
    copied(worker, sender, digest, NEW, "")
    times = worker.update_times()
    assert [*times] == ["begun", "check", "launch", "copy"]
    moments = [began, *times.values(), time.monotonic()]
    assert moments == sorted(moments)
    with pytest.raises(UpdateError):
        worker.copy_update("abcdef", sender.opened, {})
    assert worker.update_times() == times, "expected those of the last update that has succeeded"
    sender.release()


def test_handles_that_were_released_are_never_read_again(worker: Worker):
    digest, sender = worker.plan_update(MANIFEST), KeptHandleSender(CPU)
    first = copied(worker, sender, digest, NEW, "")
    sender.release()
    assert sender.opened == ""
    second = copied(worker, sender, digest, changed(1), first)
    assert second != first
    expect_loaded(worker.model, changed(1))
    with pytest.raises(UpdateError, match=f"has opened none called '{first}'"):
        worker.copy_update(digest, first, {})
    expect_loaded(worker.model, changed(1))
    sender.release()


def test_handles_of_other_tensors_than_planned_touch_nothing(worker: Worker):
    digest, sender = worker.plan_update(MANIFEST), KeptHandleSender(CPU)
    for wrong in ({"upper": NEW["upper"]}, NEW | {"lower": NEW["lower"].float()}):
        with pytest.raises(UpdateError, match=r"1 tensors are not those of the plan|2 tensors are not"):
            copied(worker, sender, digest, wrong, "")
        assert untouched(worker)
    sender.release()


def test_without_a_name_nothing_that_was_opened_is_used(worker: Worker):
    digest = worker.plan_update(MANIFEST)
    with pytest.raises(UpdateError, match="was sent no handles, and has opened none called ''"):
        worker.copy_update(digest, "", {})
    assert untouched(worker)


def test_on_a_gpu_handles_are_new_once_a_tensor_is_elsewhere(monkeypatch: pytest.MonkeyPatch):
    made: list[list[str]] = []

    def handles(self: KeptHandleSender, named: Any) -> dict:
        made.append([name for name, _ in named])
        return {"GPU-1": {name: {"at": tensor.data_ptr()} for name, tensor in named}}

    monkeypatch.setattr("extensions.colocate.HandleSender.handles", handles)
    monkeypatch.setattr("extensions.planned_colocate.synchronize", lambda device: None)
    sender, tensors = KeptHandleSender("cuda"), dict(NEW)
    first = (sender.handles(tensors.items()), sender.opened)
    assert (sender.handles(tensors.items()), sender.opened) == first
    assert len(made) == 1
    tensors["lower"] = tensors["lower"].clone()
    assert sender.handles(tensors.items()) != first[0]
    assert sender.opened not in ("", first[1])
    for changed in (tensors["lower"].view(torch.int16), tensors["lower"].view(4, 3)):  # at the same address
        before, tensors["lower"] = sender.opened, changed
        assert (sender.handles(tensors.items()), sender.opened != before)[1]
    assert len(made) == 4
    again = sender.opened
    tensors["lower"] = tensors["lower"].t()  # not contiguous: the sender copies it, every time
    opened = {sender.handles(tensors.items()) and sender.opened for _ in range(2)}
    assert len({again, *opened}) == 3
    assert len(made) == 6
