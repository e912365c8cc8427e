"""What a trainer changes for updates of what has changed, who is measured with it, and what is said of it then."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions.elements import integers
from suite.actors.shards import TURNED_BITS, local, turn_bits
from suite.benchmarks.test_changes import in_flight, shares
from suite.driver.measuring import Measuring
from suite.driver.moving import Moved
from suite.selftest.runs import ONE_CASE, examine
from suite.subjects.planned import SparseTrainer
from suite.subjects.registry import NAMED

SPARSE = NAMED["planned-sparse"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_about_one_in_so_many_elements_is_turned_and_turned_back(dtype: torch.dtype):
    tensors = [torch.arange(size).to(dtype) for size in (1, 7, 1000, 0)]
    before = [tensor.clone() for tensor in tensors]
    assert turn_bits(tensors, 10, 3) == 1 + 1 + 100
    differing = [integers(now) ^ integers(then) for now, then in zip(tensors, before, strict=True)]
    assert [int((bits != 0).sum()) for bits in differing] == [1, 1, 100, 0]
    assert all(bit in {2**n for n in range(TURNED_BITS)} | {0} for bits in differing for bit in bits.tolist())
    again = [tensor.clone() for tensor in before]
    turn_bits(again, 10, 4)
    assert not torch.equal(again[2], tensors[2])
    turn_bits(tensors, 10, 3)
    assert all(map(torch.equal, tensors, before))


def test_a_part_is_a_shards_own():
    shard = SimpleNamespace(to_local=lambda: "mine")
    assert local(shard) == "mine"
    assert local(tensor := torch.ones(1)) is tensor


class Sender:
    def __init__(self, *met: Any) -> None:
        self.calls: list = [met]

    def compare(self, named: Any, manifest: list) -> None:
        self.calls.append(("compare", named, manifest))

    def send(self, tensors: Any) -> int:
        self.calls.append("send")
        return 8

    def forget(self) -> None:
        self.calls.append("forget")


def test_rank_0_compares_before_it_announces_and_the_others_gather_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("suite.subjects.protocol.load", lambda named, what: Sender)
    held = []
    tensors = SimpleNamespace(held=lambda: held.append(1) or "all", manifest=lambda: "manifest")
    halves = [SparseTrainer(SPARSE, SimpleNamespace(rank=rank, device="cpu")) for rank in (0, 1)]
    for half in halves:
        half.invite("address", 7, 3)
        half.gather(tensors)
        announced = half.announce(tensors)
        assert announced.pop("update") != ""
        assert announced == {"manifest": "manifest"}
        assert half.send(tensors, lambda: None) == (8 if half is halves[0] else 0)
        half.forget()
    assert halves[0]._sender.calls == [("address", 7, 3, "cpu"), ("compare", "all", "manifest"), "send", "forget"]
    assert halves[1]._sender is None
    assert len(held) == 3
    assert SPARSE.speakers(2) == 2


MEASURES = """
@pytest.mark.changes
@pytest.mark.benchmark
@pytest.mark.models(cpu=["qwen3-1m"])
def test_measures(subject, stage, model):
    print("measured", subject.name)

@judged()
def test_judges(subject, stage, model): pass
"""


@pytest.mark.parametrize(("subject", "is_measured"), [("planned-sparse", True), ("planned", False)])
def test_only_subjects_that_send_changes_are_measured_with_them(tmp_path: Path, subject: str, is_measured: bool):
    stage = next(argument for argument in ONE_CASE if argument.startswith("--stage"))
    finished = examine(tmp_path, MEASURES, stage, f"--subject={subject}", "-s")
    assert (f"measured {subject}" in finished.output) == is_measured


@pytest.mark.parametrize("compares", [True, False])
def test_a_subject_that_sends_changes_is_given_some(compares: bool):
    measuring, negated = Measuring.__new__(Measuring), []
    measuring.subject = SimpleNamespace(compares=compares)
    measuring.trainer = SimpleNamespace(negate=lambda: negated.append(1))
    measuring.renew()
    assert bool(negated) == compares


def test_what_is_said_of_changes_is_a_share_of_a_whole_broadcast():
    steps = {"begin": 0.5, "transfer": 2.0, "end": 0.25}
    rounds = [Moved(9.0, 6 * 10**9, 3, steps, 1, announce_s=4.0)] * 3
    found = shares(rounds, 10**11, [10.0, 8.0, 12.0])
    assert (found["transfer_of_whole_broadcast"], found["compare_of_whole_broadcast"]) == (0.2, 0.4)
    assert math.isclose(found["gb_per_s"], 3.0)
    assert found["steps_s"] == {"compare": [4.0] * 3, "begin": [0.5] * 3, "transfer": [2.0] * 3, "end": [0.25] * 3}
    assert (found["bytes_sent"], found["whole_bytes"], found["elapsed_samples_s"]) == (6 * 10**9, 10**11, [9.0] * 3)


def test_no_engine_pauses_for_comparing():
    found = in_flight([Moved(9.0, 8, 3, {}, 1, pause_s=10.0, token_s=0.5, announce_s=4.0)])
    assert (found["pause_samples_s"], found["update_samples_s"], found["token_samples_s"]) == ([6.0], [5.0], [0.5])
