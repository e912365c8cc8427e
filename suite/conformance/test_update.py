"""update.*: after an update the engine computes with exactly the trainer's weights."""

import math

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.driver.together import MAX_TOKENS
from suite.models import TIED

LEARNING_RATE = 0.002
ONE, MINUS_ONE = 0x3F80, 0xBF80  # their bits in bfloat16


@requirement(
    "update.zeroed",
    MUST,
    text="After an update with zeros, every weight element that the engine computes with is zero and at least one was "
    "looked at, the engine generates what a model of zeros does, and check_weights_changed() turned true. It is false "
    "where a single element of any tensor is not zero, or two that add up to zero.",
    because="Where a backend replaces parameters with empty ones, 'all are zero' holds although nothing was updated.",
    models=[TIED],
)
def test_zeroed(sync: Sync, target: int) -> None:
    sync.load(target)
    sync.update()
    expect(sync.differing_from_zero() > 0, "weights before the update to zeros", "none", sync.where)
    sync.trainer.fill(None)
    sync.update()
    sync.expect_zero()
    sync.expect_reported_zero(True)
    answers = sync.generate(sync.prompts())[0]
    uniform = -math.log(sync.spec.config["vocab_size"])
    for answer in answers:
        expect(answer["tokens"] == [0] * MAX_TOKENS, "token 0 of a zero model", answer, sync.where)
        close = all(math.isclose(p, uniform, abs_tol=1e-3) for p in answer["logprobs"])
        expect(close, f"log-probabilities of {uniform:.4f} from a zero model", answer, sync.where)
    of_16_bits = [tensor["name"] for tensor in sync.manifest if tensor["dtype"] == "bfloat16"]
    for name, bits in zip((sync.weight, *of_16_bits[-1:]), ([ONE], [ONE, MINUS_ONE]), strict=False):
        if name in of_16_bits:
            sync.update(alter={"bits": {name: bits}})
            sync.expect_not_reported_zero()
    sync.load(target)
    sync.update()
    sync.expect_reported_zero(False)


@requirement(
    "update.exact",
    MUST,
    text="After an update, every tensor that the engine computes with equals, bit by bit, that of an engine that "
    "loaded the same checkpoint from disk: weights, buffers, and whatever else modules, attention and quantisation "
    "hold. It does so from the moment on at which the update is acknowledged, and after the update back.",
    because="Shapes, sums and 'the output changed' let swapped, stale and half loaded tensors pass, and weights alone "
    "let spoilt buffers pass. What copies on behind the acknowledgement is done by the time someone looks.",
    seen_in=(
        "vllm#42821",
        "vllm#44814",
        "vllm#48284",
        "vllm#51063",
        "prime-rl#2714",
        "sglang#14178",
        "vllm#57022",
        "vllm#44371",
    ),
    models=[TIED],
)
def test_exact(sync: Sync, target: int) -> None:
    sync.load(sync.seed)
    sync.update()
    sync.expect_all_different(target)
    for seed in (target, sync.seed):  # there and back: the second update meets what the first has processed
        sync.load(seed)
        at_once = str(sync.pool.scratch())
        sync.update(saved=at_once)
        sync.expect_exact(seed)
        sync.expect_equal_to(at_once, "what the engine computed with when it acknowledged the update")


@requirement(
    "update.behaviour",
    MUST,
    text="After an update, the engine chooses the greedy tokens of the trainer's own forward pass wherever the choice "
    "is clear, and the log-probabilities of its tokens are the trainer's within the stated tolerance. Both are, bit by "
    "bit, those of an engine that loaded the same checkpoint from disk, from short prompts to the longest.",
    because="Weights may be right where they are read and not where they are used.",
    seen_in=("vllm#42821", "trl#5312", "slime#929"),
    models=[TIED],
)
def test_behaviour(sync: Sync, target: int) -> None:
    for seed in (sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_same_behaviour()
        sync.expect_cold_answers(seed)


@requirement(
    "update.repeated",
    MUST,
    text="Three different updates in a row are each exact.",
    because="Loading into a model that has already been processed differs from loading into a fresh one.",
    seen_in=("vllm#42821", "skyrl#1680", "verl#7136", "vllm#14266", "vllm#28425"),
    models=[TIED],
)
def test_repeated(sync: Sync, target: int) -> None:
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    sync.trainer.fill(None)
    sync.update()
    sync.expect_zero()
    sync.load(sync.seed)
    sync.update()
    sync.expect_exact(sync.seed)


@requirement(
    "update.order",
    MUST,
    text="An update is exact whatever the order of its tensors.",
    because="Layers that wait for their last tensor may be finished before it came, and trainers send in orders of "
    "their own.",
    seen_in=("sglang#14178", "ms-swift#9060"),
    models=[TIED],
)
def test_order(sync: Sync, target: int) -> None:
    for seed, order in ((target, "reversed"), (sync.seed, "shuffled:1"), (target, "shuffled:2")):
        sync.load(seed)
        sync.update(order=order)
        sync.expect_exact(seed)


@requirement(
    "update.trained",
    MUST,
    text="After an optimiser step of a trainer that holds the model in shards, the update sends the stepped weights, "
    "whole.",
    because="What is sent may be a rank's own shard, or a copy from before the step.",
    seen_in=("slime#929", "ms-swift#10204", "trl#5312"),
    models=[TIED],
)
def test_trained(sharded: Sync, target: int) -> None:
    sharded.load(target)
    sharded.update()
    sharded.expect_exact(target)
    before = sharded.generate(sharded.prompts())
    steps = sharded.trainer.step(2, seed=7, learning_rate=LEARNING_RATE)
    changed, elements = steps[0]["changed_elements"], steps[0]["elements"]
    moves = "a step that moves most weights"
    expect(changed > elements // 2, moves, f"{changed} of {elements} elements moved", sharded.where)
    sharded.update()
    sharded.expect_moved_from(target)
    sharded.expect_same_behaviour()
    other = sharded.generate(sharded.prompts()) != before
    expect(other, "other answers after training", "those from before", sharded.where)
