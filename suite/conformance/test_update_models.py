"""update.tied, update.untied, update.moe: models whose tensors are not simply those of the checkpoint."""

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
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        for rank in sync.compared(seed):
            _expect_every_expert_and_router(sync, rank["shapes"])
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
    for rank in sync.call_engines("probe_embedding_and_head")[0]:
        applied = f"an output layer that applies {which} of the embedding's {rank['rows']} rows"
        found = f"{rank['equal']} of them on rank {rank['rank']}"
        expect(rank["equal"] == (rank["rows"] if which == "all" else 0), applied, found, sync.where)


def _expect_every_expert_and_router(sync: Sync, shapes: dict[str, list[int]]) -> None:
    """What was compared has all experts of every layer, which vLLM fuses into two weights, and their router."""
    experts = sync.spec.config["num_experts"]
    for layer in range(sync.spec.config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        routed = shapes.get(f"{prefix}gate.weight", [0])[0]
        fused = [name for name, shape in shapes.items() if name.startswith(f"{prefix}experts.") and shape[0] == experts]
        if routed != experts or len(fused) < 2:
            raise RuntimeError(
                f"expected {experts} experts and their router among what is compared of {prefix}, found"
                f" { {name: shape for name, shape in shapes.items() if name.startswith(prefix)} } {sync.where}"
            )
