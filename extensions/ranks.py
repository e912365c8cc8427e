"""Which of an engine's workers this one is."""

from typing import Any


def rank_in_engine(worker: Any) -> int:
    """This worker's rank among all workers of its engine, 0 and up.

    vLLM counts the workers of every data-parallel replica from 0 again; `data_parallel_index` says which replica this
    is. Of a dense model each replica takes itself for the only one, and `data_parallel_rank` is 0 in all of them.
    """
    parallel = worker.vllm_config.parallel_config
    return getattr(parallel, "data_parallel_index", 0) * parallel.world_size + worker.rank
