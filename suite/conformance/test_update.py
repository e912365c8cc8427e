"""update.*: after an update the engine computes with exactly the trainer's weights."""

import math

import pytest

from suite.driver import MAX_TOKENS, Sync

TIED, UNTIED, LLAMA = "qwen3-tied-tiny", "qwen3-untied-tiny", "llama-tiny"
MOE = {"cpu": ["qwen3-moe-tiny"], "gpu": ["qwen3-moe-reduced"]}
LEARNING_RATE = 0.002
WHOLE_EVERYWHERE = ("model.norm.weight", "model.layers.0.input_layernorm.weight")  # not sharded, packed or quantised
BFLOAT16_BITS = {
    "infinity": 0x7F80,
    "-infinity": 0xFF80,
    "quiet NaN": 0x7FC0,
    "NaN with a payload": 0x7FD5,
    "-NaN": 0xFFC1,
    "signalling NaN": 0x7F81,
    "-0": 0x8000,
    "smallest subnormal": 0x0001,
    "largest negative subnormal": 0x807F,
    "largest": 0x7F7F,
}

# Bits of float32 numbers half way between two of bfloat16, which no checkpoint of the suite has, and of the even one.
TIES = {0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0xBF808000: 0xBF80, 0xBF818000: 0xBF82}


@pytest.mark.requirement("update.zeroed", models=[TIED])
def test_zeroed(sync: Sync, target: int) -> None:
    sync.load(target)
    sync.update()
    assert sync.differing_from_zero() > 0, f"expected weights before the update to zeros, found none {sync.where}"
    sync.trainer.fill(None)
    sync.update()
    sync.expect_zero()
    sync.expect_reported_zero(True)
    answers = sync.generate(sync.prompts())[0]
    uniform = -math.log(sync.spec.config["vocab_size"])
    for answer in answers:
        assert answer["tokens"] == [0] * MAX_TOKENS, f"expected token 0 of a zero model, found {answer} {sync.where}"
        assert all(math.isclose(p, uniform, abs_tol=1e-3) for p in answer["logprobs"]), (
            f"expected log-probabilities of {uniform:.4f} from a zero model, found {answer} {sync.where}"
        )
    sync.load(target)
    sync.update()
    sync.expect_reported_zero(False)


@pytest.mark.requirement("update.exact", models=[TIED])
def test_exact(sync: Sync, target: int) -> None:
    sync.load(sync.seed)
    sync.update()
    sync.expect_all_different(target)
    sync.load(target)
    sync.update()
    sync.expect_exact(target)


@pytest.mark.requirement("update.behaviour", models=[TIED])
def test_behaviour(sync: Sync, target: int) -> None:
    for seed in (sync.seed, target):
        sync.load(seed)
        sync.update()
        sync.expect_same_behaviour()


@pytest.mark.requirement("update.repeated", models=[TIED])
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


@pytest.mark.requirement("update.tied", models=[TIED])
def test_tied(sync: Sync, target: int) -> None:
    _twice_exact(sync, target)


@pytest.mark.requirement("update.untied", models=[UNTIED])
def test_untied(sync: Sync, target: int) -> None:
    _twice_exact(sync, target)


@pytest.mark.requirement("update.moe", models=MOE)
def test_moe(sync: Sync, target: int) -> None:
    _twice_exact(sync, target)


@pytest.mark.requirement("update.order", models=[TIED])
def test_order(sync: Sync, target: int) -> None:
    for seed, order in ((target, "reversed"), (sync.seed, "shuffled:1"), (target, "shuffled:2")):
        sync.load(seed)
        sync.update(order=order)
        sync.expect_exact(seed)


@pytest.mark.requirement("update.dtype", models=[TIED])
def test_dtype(sync: Sync, target: int) -> None:
    sync.load(target, dtype="float32")
    moved = sync.update()
    expected = 4 * sync.spec.elements
    assert moved.bytes_sent == expected, f"expected {expected} float32 bytes, found {moved.bytes_sent} {sync.where}"
    sync.expect_exact(target)
    halves = [half for float32 in TIES for half in (float32 & 0xFFFF, float32 >> 16)]  # little-endian
    sync.update(alter={"bits": {WHOLE_EVERYWHERE[0]: halves}})
    for found in sync.call_engines("probe_bits", WHOLE_EVERYWHERE[0], len(TIES))[0]:
        assert found == [*TIES.values()], (
            f"expected ties rounded to even, {[*map(hex, TIES.values())]}, found {[*map(hex, found)]} {sync.where}"
        )


@pytest.mark.requirement("update.nonfinite", models=[TIED])
def test_nonfinite(sync: Sync, target: int) -> None:
    sync.load(target)
    sync.update(alter={"bits": {name: [*BFLOAT16_BITS.values()] for name in WHOLE_EVERYWHERE}})
    for name in WHOLE_EVERYWHERE:
        for found in sync.call_engines("probe_bits", name, len(BFLOAT16_BITS))[0]:
            wrong = {
                what: f"{bits:#06x} became {arrived:#06x}"
                for (what, bits), arrived in zip(BFLOAT16_BITS.items(), found, strict=True)
                if bits != arrived
            }
            assert not wrong, f"expected {name} bit by bit, found {wrong} {sync.where}"
    sync.update()
    sync.expect_exact(target)


@pytest.mark.requirement("update.trained", models=[TIED])
def test_trained(sharded: Sync, target: int) -> None:
    sharded.load(target)
    sharded.update()
    sharded.expect_exact(target)
    before = sharded.generate(sharded.prompts())
    steps = sharded.trainer.step(2, seed=7, learning_rate=LEARNING_RATE)
    changed, elements = steps[0]["changed_elements"], steps[0]["elements"]
    assert changed > elements // 2, (
        f"expected a step that moves the weights, found {changed} of {elements} {sharded.where}"
    )
    sharded.update()
    sharded.expect_moved_from(target)
    sharded.expect_same_behaviour()
    assert sharded.generate(sharded.prompts()) != before, f"expected other answers after training {sharded.where}"


def _twice_exact(sync: Sync, target: int) -> None:
    """There and back: a second update meets what the first has processed."""
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
        sync.expect_same_behaviour()
