"""update.tied, update.untied, update.moe, update.experts_apart: models that hold tensors in a way of their own."""

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.moving import Moved
from suite.driver.sync import Sync
from suite.models import TIED

HEAD = "lm_head.weight"


@requirement(
    "update.tied",
    MUST,
    text="With tied embeddings, an update that sends the embedding and no output layer is exact in both.",
    because="The two share one tensor until a backend repacks one of them.",
    seen_in=("vllm#51063", "vllm#51665"),
    models=[TIED],
)
def test_tied(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed):
        sync.load(seed)
        _expect_sent(sync, sync.update(), head=False)
        sync.expect_exact(seed)
        _expect_applied(sync, "all")
        sync.expect_same_behaviour()


@requirement(
    "update.untied",
    MUST,
    text="With untied embeddings, embedding and output layer each get their own tensor, and neither the other's.",
    because="Code written for tied models discards or duplicates the output layer.",
    seen_in=("vllm#51063", "vllm#51665"),
    models=["qwen2-tiny"],
)
def test_untied(sync: Sync, target: int) -> None:
    for seed in (target, sync.seed):
        sync.load(seed)
        _expect_sent(sync, sync.update(), head=True)
        sync.expect_exact(seed)
        _expect_applied(sync, "none")
        sync.expect_same_behaviour()


@requirement(
    "update.moe",
    MUST,
    text="Two updates in a row of a mixture of experts, sent expert by expert, are each exact in every expert and "
    "router.",
    because="Kernels want the experts fused, and a second load can write into the layout of the first.",
    seen_in=("vllm#42821", "skyrl#1680", "vllm#41670"),
    models={"cpu": ["qwen3-moe-tiny"], "gpu": ["qwen3-moe-reduced"]},
)
def test_moe(sync: Sync, target: int) -> None:
    _expect_experts_updated(sync, target, apart=False)


@pytest.mark.engine(enable_expert_parallel=True)
@requirement(
    "update.experts_apart",
    MUST,
    text="Where each rank of an engine has whole experts of its own (expert parallelism), two updates in a row are "
    "each exact in every expert and router, and the update names no expert missing that is another rank's.",
    because="A rank is sent the experts of all ranks: it has to find its own among them, by numbers that are not those "
    "of its layers, and to leave out the others.",
    seen_in=("vllm#25171", "vllm#46441", "sglang#26015"),
    on="gpu",  # vLLM's CPU engine (0.32) ends when an expert of another rank is chosen
    models={
        "gpu-colocate-tp2": ["qwen3-moe-reduced"],
        **dict.fromkeys(("gpu-split-tp2", "gpu-colocate-tp4", "gpu-split-pp2-tp2"), ("qwen3-30b-a3b-2l",)),
    },
)
def test_experts_apart(sync: Sync, target: int) -> None:
    _expect_experts_updated(sync, target, apart=True)


def _expect_experts_updated(sync: Sync, target: int, apart: bool) -> None:
    """Update there and back; `apart` where each expert is on one rank of those that have its layer."""
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        _expect_every_expert_and_router(sync, [rank["shapes"] for rank in sync.compared(seed)], apart)
        sync.expect_exact(seed)
        sync.expect_same_behaviour()


def _expect_sent(sync: Sync, moved: Moved, head: bool) -> None:
    """The trainer has sent the model's tensors, the output layer among them or not."""
    names = [tensor["name"] for tensor in sync.manifest]
    if moved.tensors != len(names) or (HEAD in names) != head:
        expected = f"{len(names)} tensors {'with' if head else 'without'} {HEAD}"
        raise RuntimeError(f"expected an update of {expected}, found {moved.tensors} of {names} {sync.where}")


def _expect_applied(sync: Sync, which: str) -> None:
    """On every rank the output layer applies all of the embedding's rows, or none; see `probe_embedding_and_head`."""
    found = [rank for rank in sync.call_engines("probe_embedding_and_head")[0] if rank["rows"]]
    if not found and (which == "all" or sync.stage.pipeline_parallel_size == 1):
        raise RuntimeError(f"expected a rank with both embedding and output layer, found none {sync.where}")
    for rank in found:
        applied = f"an output layer that applies {which} of the embedding's {rank['rows']} rows"
        some = f"{rank['equal']} of them on rank {rank['rank']}"
        expect(rank["equal"] == (rank["rows"] if which == "all" else 0), applied, some, sync.where)


def _expect_every_expert_and_router(sync: Sync, ranks: list[dict[str, list[int]]], apart: bool) -> None:
    """What was compared has all experts of every layer, which vLLM fuses into two weights, and their router.

    ranks: {weight: shape} of every rank. A layer is on all of them, or on those of one rank in the pipeline.
    """
    experts = sync.spec.config["num_experts"]
    for layer in range(sync.spec.config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        there = [shapes for shapes in ranks if f"{prefix}gate.weight" in shapes]
        routed = {shapes[f"{prefix}gate.weight"][0] for shapes in there}
        names = [name for name in (there[0] if there else ()) if name.startswith(f"{prefix}experts.")]
        fused = {name: [shapes[name][0] for shapes in there] for name in names}
        whole = [name for name, counts in fused.items() if sum(counts) == experts * (1 if apart else len(there))]
        if routed != {experts} or len(whole) < 2:
            raise RuntimeError(
                f"expected {experts} experts and their router among what is compared of {prefix}, found routers of"
                f" {sorted(routed)} and, by rank, {fused} {sync.where}"
            )
