"""errors.*: a wrong update is refused in time, by name, and the engine goes on as before."""

from collections.abc import Callable

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.sync import Sync
from suite.models import TIED
from suite.processes.call import SubjectFailed

DEADLINE_S = 30.0
UNKNOWN = "model.layers.1.mlp.ghost_proj.weight"
NO_SUCH_LAYER = "model.layers.999.mlp.down_proj.weight"
JOINED, NORM = "k_proj.weight", "norm.weight"  # ends of names; vLLM has the first in one weight with two others


@requirement(
    "errors.unknown_name",
    MUST,
    text="An update with a tensor that the model does not have, in one of its layers, in a layer that it does not have,"
    " or under a prefix of its own, is refused within its deadline, naming it, and the engine still generates what it "
    "generated before.",
    because="An ignored name is a renamed layer that is never updated; a crash is an engine lost. Where layers are "
    "spread over ranks, a layer that no rank has is taken for another rank's.",
    seen_in=("vllm#57854", "vllm#51063"),
    models=[TIED],
)
def test_unknown_name(sync: Sync, target: int) -> None:
    unknown = (UNKNOWN, NO_SUCH_LAYER, f"module.{sync.weight}")
    _expect_refused(sync, target, [(name, {"add": {sync.weight: name}}) for name in unknown])


@requirement(
    "errors.missing_name",
    MUST,
    text="An update that lacks a tensor of the model, also one of those that the engine joins in one weight, is refused"
    " within its deadline, naming it, and the engine still generates what it generated before.",
    because="A layer that receives only some of its tensors is finished over uninitialised memory, silently. What "
    "counts the engine's weights takes one that has got a part for whole.",
    seen_in=("vllm#44814", "prime-rl#2714", "vllm#57854"),
    models=[TIED],
)
def test_missing_name(sync: Sync, target: int) -> None:
    _expect_refused(sync, target, [(name, {"drop": [name]}) for name in (sync.weight, *_ending(sync, JOINED, NORM))])


@requirement(
    "errors.shape",
    MUST,
    text="An update with a tensor of another shape than the model's, of a row less or more or of as many elements, is "
    "refused within its deadline, naming it, and the engine still generates what it generated before.",
    because="Half loaded, the tensors already consumed are gone, and the next request ends the engine. What is cut or "
    "reshaped until it fits is loaded to other places than it was trained at.",
    seen_in=("vllm#57854", "trl#6913"),
    models=[TIED],
)
def test_shape(sync: Sync, target: int) -> None:
    rows, *columns = next(tensor["shape"] for tensor in sync.manifest if tensor["name"] == sync.weight)
    hows = ["truncate", "lengthen"] + ["turn"] * ([rows] != columns)
    wrong = [(how, sync.weight) for how in hows] + [("truncate", name) for name in _ending(sync, JOINED)]
    _expect_refused(sync, target, [(name, {how: [name]}) for how, name in wrong])


@requirement(
    "errors.dtype",
    MUST,
    text="An update with a tensor of a dtype that cannot be the model's weights, integers or 8-bit floats without their"
    " scales, is refused within its deadline, naming it, and the engine still generates what it generated before.",
    because="Copying casts whatever it is given, and a dtype that cannot be sent leaves the other side waiting.",
    seen_in=("trl#3690", "trl#6913"),
    models=[TIED],
)
def test_dtype(sync: Sync, target: int) -> None:
    own = next(tensor["dtype"] for tensor in sync.manifest if tensor["name"] == sync.weight)
    wrong = {"int32", "float8_e4m3fn"} - {own}
    _expect_refused(sync, target, [(sync.weight, {"cast": {sync.weight: dtype}}) for dtype in sorted(wrong)])


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


def _ending(sync: Sync, *ends: str) -> list[str]:
    """The first tensor whose name has each of these ends; of a model without one, none."""
    names = [tensor["name"] for tensor in sync.manifest]
    found = (next((name for name in names if name.endswith(end)), None) for end in ends)
    return [name for name in found if name]


def _expect_refused(sync: Sync, target: int, wrong: list[tuple[str, dict]]) -> None:
    """Updates that are altered are refused one after the other, each by a name, and all is as before."""
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.load(target)
    names = [tensor["name"] for tensor in sync.manifest]
    errors = [(naming, sync.refusal(DEADLINE_S, alter=alter)) for naming, alter in wrong]
    sync.expect_same_answers(answers, "the refused update")
    sync.expect_equal_to(weights, "the weights from before the refused update")
    for naming, error in errors:
        expect(naming in error, f"an error that names {naming}", error, sync.where)
        others = [name for name in names if name in error.replace(naming, "")]
        expect(len(others) <= len(names) / 2, f"an error that names {naming}, and not all tensors", error, sync.where)
    sync.update()
    sync.expect_exact(target)
