"""cache.*: what was cached under the old weights is not used under the new ones."""

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import Differs
from suite.driver.sync import Sync
from suite.models import TIED
from suite.sequences.player import LONG_PROMPT
from suite.stages import GPU_OF_ONE_RANK

SEES = "blip2-tiny"


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


@requirement(
    "cache.encoder",
    MUST,
    text="After an update, a model that takes pictures answers as a cold-loaded engine does, also when it is asked "
    "about a picture that it has seen under the old weights; without the reset that the extension documents it would "
    "not.",
    because="vLLM keeps what a vision encoder made of a picture, and knows it by the picture alone: the next prompt "
    "with it gets what old weights have made, also where prefixes were forgotten.",
    seen_in=("vllm#44910", "trl#7198", "verl#6523"),
    models={"cpu-tp1": [SEES], **dict.fromkeys(GPU_OF_ONE_RANK, (SEES,))},
)
def test_encoder(sync: Sync, target: int) -> None:
    for seed in (sync.seed, target, sync.seed):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)
        sync.expect_cold_answers(seed)
    sync.load(target)
    sync.update(reset_cache=False)
    try:
        sync.expect_cold_answers(target)
    except Differs:
        return  # it forgets prefixes before it answers: what is stale is what the encoder has made
    finally:
        sync.reset_caches()
    raise RuntimeError(f"the engine keeps nothing of a picture: a missing reset would not be seen {sync.where}")
