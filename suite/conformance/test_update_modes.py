"""update.graphs, update.fp8, update.fp8_cache, update.quantised: the engine's own optimisations meet new weights."""

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.sync import Sync
from suite.models import TIED
from suite.stages import GPU_OF_ONE_RANK

UNTIED = "qwen3-untied-tiny"
CACHE_SCALES = ("._k_scale", "._v_scale")
QUANTISED = ("qwen3-fp8-tiny", "qwen3-awq-tiny")
MODELS = dict.fromkeys(GPU_OF_ONE_RANK, (TIED,))


@pytest.mark.engine(enforce_eager=False)
@requirement(
    "update.graphs",
    MUST,
    text="An engine that captured CUDA graphs computes with the updated weights, and each tensor that a graph reads is "
    "at its address from before the update: parameters, buffers, and whatever else keeps its address between answers. "
    "With its own checkpoint's weights again, it answers as before any update, bit by bit.",
    because="A graph replays addresses: a tensor that was replaced leaves it computing with the old one. Two engines "
    "that compile, each for itself, were seen 0.001 apart in a log-probability: so each is compared with itself.",
    seen_in=("vllm#41670", "vllm#48941"),
    on="gpu",
    models=MODELS,
)
def test_graphs(sync: Sync, target: int) -> None:
    addresses = sync.steady_addresses()
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
        sync.expect_same_behaviour()
    sync.expect_own_answers()
    sync.expect_at(addresses)


@pytest.mark.engine(quantization="fp8")
@requirement(
    "update.fp8",
    MUST,
    text="An engine with online FP8 quantisation, updated from bfloat16 tensors, equals one that quantised the same "
    "checkpoint when it loaded it: weights and scales.",
    because="Processing after loading drops loaders and changes layouts, and the second time it starts from its own "
    "result.",
    seen_in=("vllm#14266", "vllm#28425", "verl#7136", "vllm#41670"),
    on="gpu",
    models=MODELS,
)
def test_fp8(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)


@pytest.mark.engine(kv_cache_dtype="fp8")
@requirement(
    "update.fp8_cache",
    MUST,
    text="An engine that keeps keys and values in FP8 is exact after an update, the scales of its cache among what is "
    "compared, and answers as an engine that loaded the same checkpoint.",
    because="The scales are buffers and attributes of attention layers, which reload builds anew: one that is stale or "
    "unset spoils every answer and no weight.",
    seen_in=("modelexpress#783", "nemo-rl#1212"),
    models={"cpu-tp1": [UNTIED], **dict.fromkeys(GPU_OF_ONE_RANK, (UNTIED,))},
)
def test_fp8_cache(sync: Sync, target: int) -> None:
    for held in sync.call_engines("probe_addresses")[0]:
        if missing := [name for name in CACHE_SCALES if not any(path.endswith(name) for path in held)]:
            raise RuntimeError(f"expected scales {missing} in the engine, found none {sync.where}")
    for seed in (target, sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
        sync.expect_cold_answers(seed)


@requirement(
    "update.quantised",
    MUST,
    text="An engine whose checkpoint is quantised, in FP8 by blocks or in 4 bits by AWQ, is exact after an update from "
    "such tensors: integers, zero points and scales.",
    because="Kernels want them packed in another order, and the second load meets what the first has packed.",
    seen_in=("vllm#28425", "verl#7136", "vime#133", "vllm#54477"),
    models={"cpu-tp1": QUANTISED, **dict.fromkeys(GPU_OF_ONE_RANK, QUANTISED)},
)
def test_quantised(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
        sync.expect_cold_answers(seed)
