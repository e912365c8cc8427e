"""An update of what has changed that breaks off, or that lies, leaves a model that says what it is."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions import patches
from extensions.group import GroupError
from extensions.model.load import LoadError
from extensions.planned import PlannedSender, PlannedWorkerExtension
from extensions.sparse import SparseSender
from suite.selftest.test_extensions_planned import WAIT_S
from suite.selftest.test_extensions_sparse import (
    MANIFEST,
    RANKS,
    SIZES,
    Engine,
    Worker,
    changed_once,
    flipped,
    is_whole,
    tensors_of,
    without_vllm,
)

__all__ = ["without_vllm"]  # a fixture


def test_an_update_that_breaks_off_half_way_leaves_an_inconsistent_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patches, "CHUNK_ELEMENTS", 1)
    engine, tensors = Engine(), tensors_of(1)
    engine.update(tensors)
    wire = engine.workers[0]._weight_sync_group
    wire.breaks_after = wire.groups + 6
    few = changed_once(engine, tensors)
    with pytest.raises(GroupError):
        engine.update(few)
    assert engine.workers[0].update_state() == "inconsistent"
    assert "rank 1 broke off the update" in wire.aborted
    wire.breaks_after = math.inf
    for rank in (1, 2):
        while not wire.sent[0, rank].empty():
            wire.sent[0, rank].get(timeout=WAIT_S)
    assert is_whole(engine.update(few))
    engine.expect(few)
    assert engine.workers[0].update_state() == "ready"


def test_a_sender_whose_tensors_break_off_gives_the_group_up():
    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        raise MemoryError("no room to gather the next")
        yield

    sender = Engine().sender
    sender._expect(MANIFEST)
    with pytest.raises(MemoryError):
        sender._send_changes(SimpleNamespace(counts=[0] * len(MANIFEST)), gathered())
    assert "MemoryError: no room to gather the next" in sender._group.aborted


class Lies(SparseSender):
    """Sends other positions or counts than it has found."""

    lie: Callable = staticmethod(lambda changes: None)

    def _send_changes(self, changes: Any, named: Any) -> int:
        type(self).lie(changes)
        return super()._send_changes(changes, named)


@pytest.mark.parametrize("position", [-1, 128, 2**31 - 1, -(2**31)])
def test_positions_outside_their_tensor_are_refused_and_touch_nothing(position: int):
    engine, tensors = Engine(sender=Lies), tensors_of(1)
    engine.update(tensors)
    Lies.lie = lambda changes: changes.found[2][0].__setitem__(0, position)
    with pytest.raises(LoadError, match="positions were sent that are none of their tensor's"):
        engine.update(flipped(tensors, {"rows": {5: 1}}))
    assert [worker.update_state() for worker in engine.workers] == ["inconsistent"] * RANKS
    engine.expect(tensors)


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("norm", 9, "norm: 9 elements are sent, expected 8 at most"),
        ("rows", -2, "rows: -2 elements are sent"),
        ("scale", 1, "scale: 1 elements are sent, expected 0 at most"),
    ],
)
def test_counts_that_can_not_be_are_refused_before_anything_is_touched(name: str, count: int, said: str):
    engine, tensors = Engine(sender=Lies), tensors_of(1)
    engine.update(tensors)
    Lies.lie = lambda changes: changes.counts.__setitem__([*SIZES].index(name), count)
    with pytest.raises(LoadError, match=said):
        engine.update(flipped(tensors, {"rows": {5: 1}}))
    engine.expect(tensors)
    assert [worker.update_state() for worker in engine.workers] == ["ready"] * RANKS
    assert "broke off the update" in engine.workers[0]._weight_sync_group.aborted


class PlainWorker(Worker):
    """A worker that takes whole updates alone."""

    receive_update = PlannedWorkerExtension.receive_update


@pytest.mark.parametrize(("worker", "sender"), [(Worker, PlannedSender), (PlainWorker, SparseSender)])
def test_where_one_side_moves_whole_updates_alone_so_do_both(worker: type, sender: type):
    engine, tensors = Engine(worker, sender), tensors_of(1)
    for sent in (tensors, changed_once(engine, tensors), tensors):
        assert is_whole(engine.update(sent))
        engine.expect(sent)


class KeepsTheFirst(SparseSender):
    """Compares with what it sent first: broken on purpose."""

    def compare(self, *args: Any) -> int | None:
        first = self.__dict__.setdefault("first", {})
        if self._sent is not None and first:
            for name, tensor in self._sent.tensors.items():
                tensor.copy_(first[name])
        found = super().compare(*args)
        first.update({name: tensor.clone() for name, tensor in self._sent.tensors.items() if name not in first})
        return found


def test_a_sender_that_compares_with_what_it_sent_first_is_found():
    for sender in (SparseSender, KeepsTheFirst):
        engine, tensors = Engine(sender=sender), tensors_of(1)
        for sent in (tensors, changed_once(engine, tensors), tensors):
            engine.update(sent)
        if sender is SparseSender:
            engine.expect(tensors)
        else:
            with pytest.raises(AssertionError, match="on rank"):
                engine.expect(tensors)
