"""A failure says what was expected, found and where, each on a line; and each expectation of an engine can fail."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from suite.actors import answers
from suite.driver import expecting
from suite.driver.expected import Differs, expect
from suite.driver.expecting import LOGPROB_TOLERANCE, Expecting
from suite.driver.together import MAX_TOKENS
from suite.models import MODELS
from suite.session.verdicts import cause_of, judge

WHERE = "after update 0 [subject=mine stage=cpu-tp1 model=qwen3-tied-tiny]"
RIGHT = {"rank": 0, "elements": 9, "weights": 3, "differing": 0, "others": 0, "first": []}
DIFFERENT = {"rank": 0, "weights": 3, "same": 0, "first": []}
ANSWER = {"tokens": [1] * MAX_TOKENS, "logprobs": [0.0] * MAX_TOKENS, "gaps": [9.0] * MAX_TOKENS}
PROMPTS = [[1, 2]] * 8


class Engines(Expecting):
    """Answers what a test says, as probes and engines do."""

    def __init__(self, *ranks: dict, answers: list[dict] | None = None) -> None:
        subject, stage = SimpleNamespace(name="mine"), SimpleNamespace(name="cpu-tp1")
        pool = SimpleNamespace(oracle=lambda key, seed: "", scratch=lambda: "")
        super().__init__(
            pool, None, [SimpleNamespace(key=SimpleNamespace(seed=0), ranks=1)], subject, stage, "qwen3-tied-tiny"
        )
        self._ranks, self._answers = [*ranks], [answers or [ANSWER] * len(PROMPTS)]

    def call_engines(self, method: str, *args: object) -> list[list]:
        return [self._ranks]

    def generate(self, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> list[list[dict]]:
        return self._answers

    def half(self, step: str, *args: object) -> list[list]:
        return [self._ranks]

    def _call(self, engine: object, method: str, *args: object) -> list[dict]:
        return self._ranks


def test_a_failure_has_a_line_for_each():
    with pytest.raises(Differs) as caught:
        expect(False, "three\nweights", "two", WHERE)
    assert str(caught.value).splitlines() == ["expected: three; weights", "found: two", f"where: {WHERE}"]
    assert cause_of(caught.value) == "expected three; weights, found two"
    assert judge("call", caught.value).verdict == "fail"
    expect(True, "three", "two", WHERE)


@pytest.mark.parametrize("found", ["", None, [], 0])
def test_a_finding_that_is_empty_is_told_all_the_same(found: object):
    assert str(Differs("something", found, WHERE)).splitlines()[1] in (f"found: {found}", "found: nothing")


WRONG = [
    (
        lambda e: e.expect_exact(1),
        RIGHT | {"differing": 2, "first": ["a: 1", "b: 1"]},
        "2 weights that differ on rank 0",
    ),
    (
        lambda e: e.expect_exact(1),
        RIGHT | {"others": 1, "first": ["rope.cos_sin_cache: 1 of 8 elements differ"]},
        "0 weights and 1 other tensor that differs on rank 0: rope.cos_sin_cache: 1 of 8",
    ),
    (lambda e: e.expect_equal_to("", "as before"), RIGHT | {"others": 2}, "0 weights and 2 other tensors that differ"),
    (lambda e: e.expect_zero(), RIGHT | {"differing": 1}, "1 weight that differs on rank 0"),
    (lambda e: e.expect_all_different(1), {**DIFFERENT, "same": 1, "first": ["a"]}, "1 equal on rank 0: a"),
    (lambda e: e.expect_moved_from(1), RIGHT | {"differing": 2}, "1 of 3 as before"),
    (lambda e: e.expect_equal_to("", "the weights from before"), RIGHT | {"differing": 3}, "3 weights that differ"),
]


@pytest.mark.parametrize(("expectation", "rank", "found"), WRONG)
def test_a_rank_that_is_wrong_fails_though_another_is_right(expectation, rank: dict, found: str):
    right = DIFFERENT if "same" in rank else RIGHT | {"differing": 3} if found.endswith("as before") else RIGHT
    expectation(Engines(right, right))
    with pytest.raises(Differs, match=found) as caught:
        expectation(Engines(right, rank))
    assert str(caught.value).splitlines()[2] == f"where: {WHERE}"


@pytest.mark.parametrize(
    ("expectation", "full", "empty"),
    [
        (lambda e: e.expect_all_different(1), DIFFERENT, {"weights": 0}),  # a rank that holds nothing that has changed
        (lambda e: e.expect_exact(1), RIGHT, {"elements": 0}),
    ],
)
def test_where_a_rank_has_nothing_to_look_at_others_tell_and_where_none_has_the_suite_says_so(
    expectation, full: dict, empty: dict
):
    expectation(Engines(full, full | empty))
    with pytest.raises(RuntimeError, match="none to look at: nothing is told") as caught:
        expectation(Engines(full | empty, full | empty))
    assert judge("call", caught.value).verdict == "error"
    wrong = {"same": 1, "first": ["a"]} if "same" in full else {"differing": 1}
    with pytest.raises(Differs):
        expectation(Engines(full | empty, full | wrong))


def test_what_has_to_differ_from_a_checkpoint_is_told_beside_the_engines_own():
    engines, asked = Engines(DIFFERENT), []
    engines.pool = SimpleNamespace(oracle=lambda key, seed: f"cold-{seed}")
    engines._call = lambda engine, *call: asked.append(call) or [DIFFERENT]
    engines.expect_all_different(1)
    assert asked == [("probe_alike", "cold-1", "cold-0")]


def test_what_the_extension_says_of_zeros_has_to_be_so_on_every_rank():
    Engines(True).expect_reported_zero(True)
    with pytest.raises(Differs, match=r"say True on every rank\nfound: \[False\]"):
        Engines(False).expect_reported_zero(True)


@pytest.fixture
def asked(tmp_path: Path) -> Engines:
    """An engine beside the written answers of a cold one, which answered alike twice."""
    engines = Engines()
    cold = [{"tokens": [1, 2], "logprobs": [-1.0, -2.0]}]
    engines.said = []
    engines.pool = SimpleNamespace(
        oracle=lambda key, seed, again=False: str(tmp_path / f"{seed}{again}"),
        tolerate=lambda key, how_far: engines.said.append(how_far),
    )
    for name in ("1False", "1True", "2True"):
        answers.write(str(tmp_path / name), cold, cold)
    answers.write(str(tmp_path / "2False"), cold, [cold[0] | {"logprobs": [-1.0, -2.5]}])
    engines.found = [dict(cold[0])]
    engines.engines[0].process = SimpleNamespace(call=lambda method, deadline_s: engines.found)
    return engines


def test_answers_are_a_cold_engines_bit_by_bit(asked: Engines):
    asked.expect_cold_answers(1)
    asked.found[0]["logprobs"] = [-1.0, -2.0000001]
    with pytest.raises(Differs, match=r"checkpoint 1, within 0\nfound: 1 other answers: prompt 0: log-prob"):
        asked.expect_cold_answers(1)
    assert asked.said == []


def test_an_engine_is_compared_with_its_own_answers_from_before(asked: Engines):
    before = [dict(asked.found[0])]
    answering = {"answers": asked.found, "cold_answers": [before, before]}
    asked.engines[0].process = SimpleNamespace(call=lambda method, deadline_s: answering[method])
    asked.expect_own_answers()
    asked.found[0]["logprobs"] = [-1.0, -2.0000001]
    with pytest.raises(Differs, match=r"the answers from before any update, within 0\nfound: 1 other answers"):
        asked.expect_own_answers()


def test_where_a_cold_engine_differs_from_itself_the_report_says_so(asked: Engines):
    asked.found[0]["logprobs"] = [-1.0, -2.4]
    asked.expect_cold_answers(2)
    assert asked.said == ["log-probabilities 0.5 apart, 2 leading tokens the same"]
    asked.found[0]["logprobs"] = [-1.0, -2.6]
    with pytest.raises(Differs, match=r"within 0\.5"):
        asked.expect_cold_answers(2)


def test_where_two_cold_engines_differ_that_is_the_tolerance(asked: Engines, tmp_path: Path):
    asked.found[0]["logprobs"] = [-1.25, -2.0]
    with pytest.raises(Differs, match="within 0"):
        asked.expect_cold_answers(1)
    other = [{"tokens": [1, 2], "logprobs": [-1.5, -2.0]}]
    answers.write(str(tmp_path / "1True"), other, other)
    asked.expect_cold_answers(1)
    assert asked.said == ["log-probabilities 0.5 apart, 2 leading tokens the same"]


def test_answers_are_a_cold_engines_where_the_trainer_does_not_compute_with_the_model(asked: Engines):
    asked.spec, asked.held = MODELS["glm4-moe-tiny"], 1  # and there is no trainer that could be asked
    asked.expect_same_behaviour()
    asked.found[0]["tokens"] = [1, 3]
    with pytest.raises(Differs, match="the answers of an engine cold-loaded from checkpoint 1"):
        asked.expect_same_behaviour()


def test_what_an_answer_leaves_where_it_was_has_to_stay_there():
    addresses = iter([{"a": 1, "scratch": 2}, {"a": 1, "scratch": 3}, {"a": 1, "scratch": 4}, {"a": 5, "scratch": 4}])
    engines = Engines()
    engines.call_engines = lambda method: [[next(addresses)]]
    steady = engines.steady_addresses()
    assert steady == [[{"a": 1}]]
    engines.expect_at(steady)
    with pytest.raises(Differs, match=r"every tensor at its address\nfound: 1 of 1 moved on rank 0 .*'a'"):
        engines.expect_at(steady)


def test_a_checksum_that_is_not_the_trainers_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch):
    found = {"a": 1, "b": 2}
    engines = Engines()
    engines.trainer = SimpleNamespace(call=lambda method: [{"a": 1, "b": 2}])
    monkeypatch.setattr(expecting, "gather", lambda calls, deadline_s: calls)
    engines.engines[0].process = SimpleNamespace(submit=lambda rpc, method, manifest: [found])
    engines.expect_sent()
    found["b"] = 3
    with pytest.raises(Differs, match=r"1 of 2 others in .*\['b'\]"):
        engines.expect_sent()
    del found["b"]
    with pytest.raises(Differs, match="1 of 2 others"):
        engines.expect_sent()
    engines.trainer = SimpleNamespace(call=lambda method: [{}])
    with pytest.raises(RuntimeError, match="nothing is told"):
        engines.expect_sent()


def test_a_weight_that_has_not_changed_its_sign_is_told_by_its_name():
    engines, probed = Engines(), {True: {"a": 1, "b": 2}, False: {"a": 1, "b": 2}}
    engines.engines[0].key = "an engine"
    engines.call_engines = lambda method, negated: [[probed[negated]]]
    before = engines.negated()
    engines.expect_negated(before)
    probed[False]["b"] = 3
    with pytest.raises(Differs, match=r"1 of 2 others on rank 0 of an engine: \['b'\]"):
        engines.expect_negated(before)
    with pytest.raises(RuntimeError, match="nothing is told"):
        engines.expect_negated([[{}]])


def test_no_address_at_all_proves_nothing():
    engines = Engines()
    engines.call_engines = lambda method: [[{}]]
    with pytest.raises(RuntimeError, match="nothing is told"):
        engines.expect_at([[{}]])


def test_weights_that_an_update_has_emptied_are_not_zero():
    with pytest.raises(Differs, match="no element of any weight"):
        Engines(RIGHT | {"elements": 0}).expect_zero()
    with pytest.raises(Differs, match="3 weights that differ on rank 0"):
        Engines(RIGHT | {"elements": 0, "differing": 3}).expect_exact(1)


def test_an_engine_is_inconsistent_where_it_says_so():
    assert Engines("ready", "inconsistent").says_inconsistent()
    assert not Engines("ready").says_inconsistent()
    assert not Engines().says_inconsistent(), "expected nothing of an extension that can't tell"
    Engines("ready").expect_consistent()
    Engines().expect_consistent()
    with pytest.raises(Differs, match="not to say inconsistent"):
        Engines("ready", "inconsistent").expect_consistent()


def test_weights_are_said_to_be_zero_by_all_ranks_or_not_at_all():
    engines = Engines()
    engines.call_engines = lambda method: [[True, False]]
    engines.expect_not_reported_zero()
    engines.call_engines = lambda method: [[True, True]]
    with pytest.raises(Differs, match="to say False where one element is not zero"):
        engines.expect_not_reported_zero()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"tokens": [1, 2] + [1] * (MAX_TOKENS - 2)}, "greedy tokens after"),
        (
            {"logprobs": [2 * LOGPROB_TOLERANCE] + [0.0] * (MAX_TOKENS - 1)},
            "log-probabilities .*found: 0.700 apart",
        ),
    ],
)
def test_another_answer_fails(change: dict, found: str):
    oracle = [ANSWER] * len(PROMPTS)
    Engines().expect_answers(PROMPTS, oracle)
    with pytest.raises(Differs, match=f"(?s){found}"):
        Engines(answers=[ANSWER] * (len(PROMPTS) - 1) + [ANSWER | change]).expect_answers(PROMPTS, oracle)


def test_answers_that_changed_are_counted():
    Engines().expect_same_answers([[ANSWER] * len(PROMPTS)], "it")
    with pytest.raises(Differs, match="the answers from before it\nfound: 1 others"):
        Engines().expect_same_answers([[ANSWER | {"tokens": []}] + [ANSWER] * (len(PROMPTS) - 1)], "it")


def test_too_few_clear_tokens_are_an_error_of_the_suite():
    unclear = [ANSWER | {"gaps": [0.0] * MAX_TOKENS}] * len(PROMPTS)
    with pytest.raises(RuntimeError, match="only 0 tokens of 8 prompts are clear-cut"):
        Engines().expect_answers(PROMPTS, unclear)
