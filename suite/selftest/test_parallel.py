"""An engine with data-parallel replicas: every one is called, and each answers in its turn."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from extensions.ranks import rank_in_engine
from suite.actors.parallel import Parallel
from suite.driver.engines import EngineKey, actor_of, engine_options
from suite.models import TIED
from suite.stages import STAGES

pytestmark = pytest.mark.selftest


class Replicas:
    """Called as an AsyncLLM of two replicas is, each of two workers."""

    def __init__(self) -> None:
        self.core_engines = [b"first", b"second"]
        self.engine_core = self

    async def _call_utility_async(self, *call: Any, engine: bytes) -> list[str]:
        assert call == ("collective_rpc", "probe_call", None, ("update_state", []), None)
        return [f"{engine.decode()} {rank}" for rank in range(2)]

    async def generate(self, prompt: dict, params: None, name: str, data_parallel_rank: int) -> AsyncIterator[Any]:
        yield f"{name} of replica {data_parallel_rank}"


class Called(Parallel):
    async def _made(self, arguments: dict) -> Replicas:
        return Replicas()

    async def _follow(self, request: Any, prompt: dict, params: Any) -> None:
        async for output in self._generated(prompt, params, next(self._numbers)):
            request.output = output


def test_all_replicas_reply_the_first_one_first():
    replies = Called({}).collective_rpc("probe_call", ("update_state", []))
    assert replies == ["first 0", "first 1", "second 0", "second 1"]


def test_replicas_answer_in_turn():
    answers = Called({}).generate([{}, {}, {}], None, use_tqdm=False)
    assert answers == ["request-0 of replica 0", "request-1 of replica 1", "request-2 of replica 0"]


def test_a_stage_with_replicas_has_engines_that_take_them():
    (stage,) = [stage for stage in STAGES if stage.name == "cpu-dp2"]
    assert (
        actor_of(EngineKey(TIED, stage.name, "broadcast", 0), stage, None)[0] == "suite.actors.parallel:ParallelEngine"
    )
    assert engine_options(stage, TIED)["data_parallel_size"] == 2
    assert all("data_parallel_size" not in engine_options(s, TIED) for s in STAGES if s is not stage)


@pytest.mark.parametrize(("index", "rank", "expected"), [(0, 0, 0), (0, 1, 1), (1, 0, 2), (3, 1, 7)])
def test_the_ranks_of_replicas_follow_each_other(index: int, rank: int, expected: int):
    parallel = SimpleNamespace(data_parallel_index=index, world_size=2)
    assert rank_in_engine(SimpleNamespace(rank=rank, vllm_config=SimpleNamespace(parallel_config=parallel))) == expected


def test_before_vllm_counted_replicas_a_rank_is_the_workers_own():
    alone = SimpleNamespace(rank=1, vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=2)))
    assert rank_in_engine(alone) == 1
