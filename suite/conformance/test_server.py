"""server.*: what a `vllm serve` says of its own weights."""

import hashlib

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED
from suite.session import verdicts

OF_NOTHING = hashlib.sha256().hexdigest()  # of a weight whose elements are elsewhere, as where a CPU kernel packs it


@requirement(
    "server.checker",
    MUST,
    text="Where a server has /weight_checker, that finds after an update that every weight it looks at has changed, "
    "and after the update back that each is as before.",
    because="Who trains with a server sees no worker: this is how they can know that an update has come.",
    seen_in=("vllm#52689",),
    models={"cpu-serve": [TIED], "gpu-serve": [TIED]},
)
def test_weight_checker(sync: Sync, target: int) -> None:
    sync.load(sync.seed)
    sync.update()
    if (before := sync.checker(action="checksum")) is None:
        verdicts.not_applicable("this vLLM's server has no /weight_checker, which came with 0.32")
    looked_at = sorted(name for name, digest in before["checksums"].items() if digest != OF_NOTHING)
    expect(looked_at, "weights that /weight_checker looks at", before["checksums"], sync.where)
    for seed, changed in ((target, looked_at), (sync.seed, [])):
        sync.load(seed)
        sync.update()
        answer = sync.checker(action="compare", baseline=before["checksums"])
        wrong = sorted({*answer["mismatches"]} ^ {*changed})
        of_all = f"{len(changed)} weights that /weight_checker finds to have changed"
        expect(not wrong and answer["match"] == (not changed), of_all, f"{len(wrong)} others: {wrong[:5]}", sync.where)
        sync.expect_exact(seed)
