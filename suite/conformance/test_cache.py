"""cache.*: what was cached under the old weights is not used under the new ones."""

from suite.conformance.requirements import MUST, requirement
from suite.driver.sync import Sync
from suite.models import TIED
from suite.sequences.player import LONG_PROMPT


@requirement(
    "cache.prefix",
    MUST,
    text="After an update and the reset that the extension documents, no prefix cached under the old weights is used; "
    "without the reset it would be.",
    because="Cached keys and values are functions of the weights that computed them.",
    seen_in=("vllm#9744", "nemo-rl#4018"),
    models=[TIED],
)
def test_prefix(sync: Sync, target: int) -> None:
    prompts = sync.prompts(length=LONG_PROMPT)
    sync.load(sync.seed)
    sync.update()
    sync.generate(prompts)
    sync.load(target)
    sync.update(reset_cache=False)
    stale = sync.generate(prompts)
    sync.reset_cache()
    fresh = sync.generate(prompts)
    if stale == fresh:
        raise RuntimeError(f"the engine caches no prefixes: a missing reset would not be seen {sync.where}")
    sync.expect_same_behaviour(prompts)
    sync.load(sync.seed)
    sync.update()
    sync.expect_same_behaviour(prompts)
