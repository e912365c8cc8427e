"""update.dtype, update.nonfinite: numbers arrive bit by bit, or rounded as torch rounds them."""

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED

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

# {bits of a float32 exactly between two bfloat16 numbers: those of the even one}; no checkpoint of ours has such ties.
TIES = {0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0xBF808000: 0xBF80, 0xBF818000: 0xBF82}


@requirement(
    "update.dtype",
    MUST,
    text="Float32 tensors sent to a bfloat16 engine arrive as torch rounds them: to the nearest, ties to even.",
    because="Truncation, or a way through float16, changes half of the weights by one unit and no shape.",
    models=[TIED],
)
def test_dtype(sync: Sync, target: int) -> None:
    sync.load(target, dtype="float32")
    moved = sync.update()
    expected = 4 * sync.spec.elements
    expect(moved.bytes_sent == expected, f"{expected} bytes of float32", moved.bytes_sent, sync.where)
    sync.expect_exact(target)
    halves = [half for float32 in TIES for half in (float32 & 0xFFFF, float32 >> 16)]  # little-endian
    sync.update(alter={"bits": {WHOLE_EVERYWHERE[0]: halves}})
    for found in sync.call_engines("probe_bits", WHOLE_EVERYWHERE[0], len(TIES))[0]:
        even = f"ties rounded to even: {[*map(hex, TIES.values())]}"
        expect(found == [*TIES.values()], even, [*map(hex, found)], sync.where)


@requirement(
    "update.nonfinite",
    MUST,
    text="NaNs with their payloads, infinities, negative zeros and subnormal numbers arrive bit by bit.",
    because="A diverged trainer has to be seen in the engine; what cleans up or flushes numbers hides it.",
    models=[TIED],
)
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
            expect(not wrong, f"{name} bit by bit", wrong, sync.where)
    sync.update()
    sync.expect_exact(target)
