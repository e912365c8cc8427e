"""An extension on the ranks of an engine: each takes its part of an update, and knows what is another's.

Four ranks, two in a pipeline of two each, with whole experts on each: all of them update, and none is an engine.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from suite import models
from suite.selftest import vllm_models
from suite.selftest.vllm_ranks import Ranks, ranks

pytestmark = [
    pytest.mark.selftest,
    pytest.mark.skipif(vllm_models.NO_ENGINE is not None, reason=str(vllm_models.NO_ENGINE)),
]

MOE, TIED, UNTIED = "qwen3-moe-tiny", models.TIED, "qwen3-untied-tiny"
REFERENCE = "extensions.broadcast:WorkerExtension"
EXPERTS = 8  # of which each of two ranks has half
GATE = "model.layers.{}.mlp.experts.{}.gate_proj.weight"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(tmp_path_factory.mktemp("ranks"), tensor_parallel=2, pipeline=2) as started:
        yield started


@pytest.mark.parametrize("model", [MOE, TIED, UNTIED])
def test_every_rank_is_as_if_it_had_loaded_the_checkpoint(four: Ranks, model: str):
    for rank in four.call("differing", model, REFERENCE):
        assert rank["differing"] == []
        assert rank["changed"] == rank["compared"] > 0
        assert rank["experts"] == (EXPERTS // 2 if model == MOE else 0)


@pytest.mark.parametrize(
    ("mutant", "model", "wrong"),
    [
        ("SkipsExpertsOfOtherRanks", MOE, {1, 2, 3}),
        ("NumbersExpertsByTheirPlace", MOE, {1, 3}),
        ("NumbersLayersByTheirPlace", TIED, {2, 3}),
    ],
)
def test_one_that_mistakes_its_part_is_told(four: Ranks, mutant: str, model: str, wrong: set[int]):
    found: list[dict[str, Any]] = four.call("differing", model, f"suite.selftest.mutants:{mutant}")
    assert {rank for rank, said in enumerate(found) if said["differing"]} == wrong


def test_a_rank_knows_the_experts_and_layers_of_others(four: Ranks):
    announced = [name for name, _ in models.tensors(models.MODELS[MOE])]
    for rank, plan in enumerate(four.call("planned", MOE, [], [])):
        layer, half = rank // 2, rank % 2
        own = {GATE.format(layer, expert) for expert in range(half * EXPERTS // 2, (half + 1) * EXPERTS // 2)}
        assert plan["problems"] == []
        assert {name for name in plan["own"] if name.endswith("gate_proj.weight")} == own
        assert {*plan["own"]} | {*plan["elsewhere"]} == {*announced}


def test_a_tensor_that_is_missing_is_missed_where_it_belongs_and_one_of_nobody_is_refused_by_all(four: Ranks):
    missing, stranger = GATE.format(1, 5), GATE.format(1, EXPERTS)
    plans = four.call("planned", MOE, [missing], [stranger])
    assert [any(missing in said for said in plan["problems"]) for plan in plans] == [False, False, False, True]
    assert all(any(stranger in said for said in plan["problems"]) for plan in plans)
