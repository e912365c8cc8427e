"""lora.*: engines that take LoRA adapters, whose base weights are updated and whose adapter is exchanged."""

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.sync import Sync
from suite.models.adapters import RANK
from suite.sequences.player import LONG_PROMPT
from suite.stages import GPU_OF_ONE_RANK

UNTIED = "qwen3-untied-tiny"
MODELS = {"cpu-tp1": [UNTIED], **dict.fromkeys(GPU_OF_ONE_RANK, (UNTIED,))}
TAKES_AN_ADAPTER = pytest.mark.engine(enable_lora=True, max_loras=1, max_lora_rank=RANK)
WRAPPED = ".base_layer."  # in the names of weights that an adapter may change


@TAKES_AN_ADAPTER
@requirement(
    "lora.exact",
    MUST,
    text="An engine that takes LoRA adapters is exact in every base weight after an update, before an adapter is "
    "loaded and with one. Its answers without the adapter are the trainer's, and those with it are the trainer's with "
    "the adapter merged.",
    because="vLLM wraps the layers that an adapter may change, and their weights then go by other names "
    "(`.base_layer`): a lookup by the checkpoint's name finds nothing, and the weight stays old.",
    seen_in=("verl#7327", "vllm#39934", "verl#6256"),
    models=MODELS,
)
def test_beside_adapters(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
    try:
        sync.load_adapter(1)
        for seed in (target, sync.seed):
            prompts = sync.prompts()
            oracle = sync.adapted(seed, 1, prompts)
            sync.load(seed)
            sync.update()
            sync.expect_base_exact(seed, WRAPPED)
            sync.expect_adapted(prompts, oracle)
            sync.expect_same_behaviour()
    finally:
        sync.clear_adapter()


@TAKES_AN_ADAPTER
@requirement(
    "lora.reloaded",
    MUST,
    text="An adapter that is loaded in place of another of the same name and path, before and after an update of the "
    "base weights, is the one that answers once the prefix cache was reset. So is one that is loaded after the other "
    "was removed. Without an adapter, the base weights answer.",
    because="vLLM knows adapters by a number, and cached prefixes by the adapter's name and path: an adapter that is "
    "trained on keeps all three.",
    seen_in=("vllm#42125", "vllm#48297", "skyrl#1606"),
    models=MODELS,
)
def test_reloaded(sync: Sync, target: int) -> None:
    prompts = sync.prompts() + sync.prompts(length=LONG_PROMPT)
    oracles = {adapter: sync.adapted(target, adapter, prompts) for adapter in (1, 2)}
    if oracles[1] == oracles[2]:
        raise RuntimeError(f"both adapters answer alike: a stale one would not be seen {sync.where}")
    sync.load(sync.seed)
    sync.update()
    try:
        sync.load_adapter(1)
        sync.load(target)
        sync.update()
        sync.expect_adapted(prompts, oracles[1])
        sync.load_adapter(2)
        sync.expect_adapted(prompts, oracles[2])
        sync.remove_adapter()
        sync.expect_has_adapter(False)
        sync.load_adapter(1)
        sync.expect_adapted(prompts, oracles[1])
        sync.expect_same_behaviour()
    finally:
        sync.clear_adapter()
