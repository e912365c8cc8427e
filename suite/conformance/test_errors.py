"""errors.*: a wrong update is refused in time, by name, and the engine goes on as before."""

import pytest

from suite import models, verdicts
from suite.driver import Sync
from suite.processes import RemoteError
from suite.sequences import MALFORMED

MODELS = ["qwen3-tied-tiny"]
DEADLINE_S = 30.0


@pytest.mark.requirement("errors.unknown_name", models=MODELS)
def test_unknown_name(sync: Sync, target: int) -> None:
    _refused(sync, target, "unknown_name")


@pytest.mark.requirement("errors.missing_name", models=MODELS)
def test_missing_name(sync: Sync, target: int) -> None:
    _refused(sync, target, "missing_name")


@pytest.mark.requirement("errors.shape", models=MODELS)
def test_shape(sync: Sync, target: int) -> None:
    _refused(sync, target, "shape")


@pytest.mark.requirement("errors.dtype", models=MODELS)
def test_dtype(sync: Sync, target: int) -> None:
    _refused(sync, target, "dtype")


@pytest.mark.requirement("errors.nested", models=MODELS)
def test_nested(sync: Sync, target: int) -> None:
    if not hasattr(sync.subject.load(), "begin_update"):
        verdicts.unsupported(f"{sync.subject.name} has no begin_update(): its updates have no beginning")
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.call_engines("begin_update", sync.manifest)
    with pytest.raises(RemoteError) as refused:
        sync.call_engines("begin_update", sync.manifest)
    assert "update" in refused.value.message, f"expected a refusal that says why, found {refused.value} {sync.where}"
    sync.call_engines("abort_update")
    sync.expect_equal_to(weights, "the weights from before the two updates")
    assert sync.generate(sync.prompts()) == answers, f"expected the answers from before the two updates {sync.where}"
    sync.load(target)
    sync.update()
    sync.expect_exact(target)


def _refused(sync: Sync, target: int, how: str) -> None:
    """An update with this wrong about one weight is refused by name, and all is as before."""
    weight = next(name for name, _ in models.tensors(sync.spec) if name.endswith("1.mlp.down_proj.weight"))
    alter, named = MALFORMED[how](weight)
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.load(target)
    error = sync.refusal(DEADLINE_S, alter=alter)
    assert named in error, f"expected an error that names {named}, found: {error} {sync.where}"
    assert sync.generate(sync.prompts()) == answers, f"expected the answers from before the refused update {sync.where}"
    sync.expect_equal_to(weights, "the weights from before the refused update")
    sync.update()
    sync.expect_exact(target)
