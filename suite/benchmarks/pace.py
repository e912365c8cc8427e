"""The host's own pace: what a call to all workers of an engine takes, once a run and stage.

An update is many calls: by broadcast, one for every tensor. Two hosts of one kind differ in what a call takes by a
factor of two. Without the pace a slower host would look like a slower vLLM.
"""

import pytest

from suite import models
from suite.driver.engines import EngineHandle
from suite.processes.call import NoAnswer, RemoteError
from suite.session.record import PACES
from suite.session.state import state_of

MODEL = "qwen3-8b"  # of whose tensors the manifest is that a call carries
WARM_UPS, SAMPLES = 3, 50
DEADLINE_S = 10.0


def measure(config: pytest.Config, engine: EngineHandle, quiet: bool = False) -> None:
    """Measure the pace on this engine's stage and keep it in config.stash[PACES], unless it is there already.

    quiet: whether nothing starts beside it. That replaces what was measured while other engines may have been starting.
    The pace stays unknown where the engine does not answer: what a test finds wrong with it is for the test to say.
    """
    paces, stage = config.stash.setdefault(PACES, {}), engine.key.stage
    if stage in paces and paces[stage]["quiet"] >= quiet:
        return
    try:
        carried = models.manifest(models.MODELS[MODEL])
        samples = engine.process.call("pace", carried, WARM_UPS, SAMPLES, deadline_s=DEADLINE_S)
    except (NoAnswer, RemoteError) as error:
        state_of(config).announce(f"{stage}: the host's pace is not known: {error.said}")
        return
    paces[stage] = {"quiet": quiet, **samples}
