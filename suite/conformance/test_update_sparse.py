"""update.sparse: where little has changed since the update before, all of it arrives, and nothing else changes."""

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect, expect_told
from suite.driver.sync import Sync
from suite.models import TIED

ONE_IN, ONE_IN_A_FEW = 100, 7  # elements that change
EQUAL_NUMBERS = ([0x0000, 0x7FC0], [0x8000, 0x7FD5])  # bits of 0 and a NaN, and of others that compare as equal
LOADED_ANEW = "the weights that a whole update brings, from a trainer that was loaded anew"


@requirement(
    "update.sparse",
    MUST,
    text="After an update in which about one in a hundred elements of each tensor has other bits than in the update "
    "before, or some elements of a few tensors, or only the sign of a zero and the payload of a NaN, every tensor that "
    "the engine computes with equals, bit by bit, what an update to the same weights brings after a trainer was loaded "
    "anew. So it does once all has changed back.",
    because="A step of reinforcement learning changes few bfloat16 weights. What compares and sends these alone may "
    "miss those that compare as equal, write them a place further, or compare with older weights than the engine has.",
    seen_in=("marin#9127", "verl#6974", "vime#392"),
    models=[TIED],
)
def test_sparse(sync: Sync, target: int) -> None:
    few = [tensor["name"] for tensor in sync.manifest if len(tensor["shape"]) == 1]
    equal = [{"bits": {few[0]: bits}} for bits in EQUAL_NUMBERS]
    sync.load(target)
    whole = sync.update().bytes_sent
    for alter in equal:
        _expect_little(sync, whole, sync.update(alter=alter).bytes_sent)
    by_sign = sync.snapshot()
    turns = ((None, ONE_IN), (few, ONE_IN_A_FEW), ([*few, sync.weight], ONE_IN_A_FEW))
    for names, one_in in turns:
        _turn(sync, names, one_in)
        sent = sync.update().bytes_sent
    _expect_little(sync, whole, sent)
    changed = sync.snapshot()
    for names, one_in in reversed(turns):
        _turn(sync, names, one_in)
        sync.update()
    sync.expect_exact(target)
    sync.load(sync.seed)
    sync.load(target)
    for names, one_in in turns:
        _turn(sync, names, one_in)
    sync.update()
    sync.expect_equal_to(changed, LOADED_ANEW)
    sync.load(target)
    sync.update(alter=equal[1])
    sync.expect_equal_to(by_sign, LOADED_ANEW)
    sync.update()
    sync.expect_exact(target)


def _turn(sync: Sync, names: list[str] | None, one_in: int) -> None:
    """Change elements of these tensors, or of all; of those that have been changed like this, back."""
    turned = sync.trainer.turn_bits(one_in, one_in, names)
    expect_told(turned, "elements that change", sync.where)


def _expect_little(sync: Sync, whole: int, sent: int) -> None:
    """A subject that sends what has changed alone has done so: else this would judge nothing of that."""
    if sync.subject.compares:
        expect(sent < whole / 2, f"less than half of {whole} bytes to be sent", sent, sync.where)
