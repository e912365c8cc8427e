"""errors.*: a wrong update is refused in time, by name, and the engine goes on as before."""

from collections.abc import Callable

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED
from suite.processes.call import SubjectFailed

DEADLINE_S = 30.0
UNKNOWN = "model.layers.1.mlp.ghost_proj.weight"


@requirement(
    "errors.unknown_name",
    MUST,
    text="An update with a tensor that the model does not have is refused within its deadline, naming it, and the "
    "engine still generates what it generated before.",
    because="An ignored name is a renamed layer that is never updated; a crash is an engine lost.",
    seen_in=("vllm#57854", "vllm#51063"),
    models=[TIED],
)
def test_unknown_name(sync: Sync, target: int) -> None:
    one_more = {"add": {sync.weight: UNKNOWN}}
    _expect_refused(sync, target, one_more, naming=UNKNOWN)


@requirement(
    "errors.missing_name",
    MUST,
    text="An update that lacks a tensor of the model is refused within its deadline, naming it, and the engine still "
    "generates what it generated before.",
    because="A layer that receives only some of its tensors is finished over uninitialised memory, silently.",
    seen_in=("vllm#44814", "prime-rl#2714", "vllm#57854"),
    models=[TIED],
)
def test_missing_name(sync: Sync, target: int) -> None:
    one_less = {"drop": [sync.weight]}
    _expect_refused(sync, target, one_less, naming=sync.weight)


@requirement(
    "errors.shape",
    MUST,
    text="An update with a tensor of another shape than the model's is refused within its deadline, naming it, and the"
    " engine still generates what it generated before.",
    because="Half loaded, the tensors already consumed are gone, and the next request ends the engine.",
    seen_in=("vllm#57854", "trl#6913"),
    models=[TIED],
)
def test_shape(sync: Sync, target: int) -> None:
    a_row_less = {"truncate": [sync.weight]}
    _expect_refused(sync, target, a_row_less, naming=sync.weight)


@requirement(
    "errors.dtype",
    MUST,
    text="An update with a tensor of a dtype that cannot be the model's weights is refused within its deadline, naming"
    " it, and the engine still generates what it generated before.",
    because="Copying casts whatever it is given, and a dtype that cannot be sent leaves the other side waiting.",
    seen_in=("trl#3690", "trl#6913"),
    models=[TIED],
)
def test_dtype(sync: Sync, target: int) -> None:
    integers = {"cast": {sync.weight: "int32"}}
    _expect_refused(sync, target, integers, naming=sync.weight)


@requirement(
    "errors.nested",
    MUST,
    text="An update that is begun inside another is refused, and the weights stay as they were.",
    because="Two updates at once leave a mixture that neither trainer has.",
    seen_in=("vllm#57854",),
    models=[TIED],
)
def test_nested(sync: Sync, target: int) -> None:
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.half("begin", sync.manifest)
    error = _raised(lambda: sync.half("begin", sync.manifest))
    expect("update" in error, "an error that says that an update is under way", error or "success", sync.where)
    sync.half("abort")
    sync.expect_equal_to(weights, "the weights from before the two updates")
    sync.expect_same_answers(answers, "the two updates")
    sync.load(target)
    sync.update()
    sync.expect_exact(target)


def _raised(call: Callable[[], object]) -> str:
    """What a call of an engine raises; empty where it succeeds."""
    try:
        call()
    except SubjectFailed as error:
        return error.message
    return ""


def _expect_refused(sync: Sync, target: int, alter: dict, naming: str) -> None:
    """An update that is altered like this is refused by name, and all is as before."""
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.load(target)
    error = sync.refusal(DEADLINE_S, alter=alter)
    sync.expect_same_answers(answers, "the refused update")
    sync.expect_equal_to(weights, "the weights from before the refused update")
    expect(naming in error, f"an error that names {naming}", error, sync.where)
    sync.update()
    sync.expect_exact(target)
