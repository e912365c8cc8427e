"""A case ends with its subject's fail or the suite's own error, and with a cause that other cases can share."""

from collections import Counter
from types import SimpleNamespace

import pytest

from suite.processes.call import Call, DeadlineExceeded, NotBegun, ProcessDied, RemoteError, Starved, failure_of, gather
from suite.session import judging
from suite.session.verdicts import ERROR, FAIL, NOT_APPLICABLE, PASS, UNSUPPORTED, Judgement, judge


def raised(kind: str, message: str, process: str = "engine-1", **more: bool) -> RemoteError:
    where = SimpleNamespace(name=process, log_path="")
    of_the_subject = {"examined": kind in ("WorkerError", "NotAnnounced")}
    return failure_of(where, {"kind": kind, "message": message, "traceback": "", **of_the_subject, **more})


def late(kind: type[Exception], said: str) -> Exception:
    process = SimpleNamespace(name="engine-1", log_path="", tail=lambda: "")
    return kind(said, process, "update()")


@pytest.mark.parametrize(
    "error",
    [raised("WorkerError", "no"), raised("NotAnnounced", "hangs"), late(DeadlineExceeded, ""), late(ProcessDied, "")],
)
def test_what_the_subjects_half_of_an_update_ends_with_is_a_fail(error: Exception):
    assert judge("call", error).verdict == FAIL
    assert judge("setup", error).verdict == ERROR


@pytest.mark.parametrize(
    "error",
    [
        raised("SuiteFault", "nothing came"),
        raised("KeyError", "'devices'"),
        late(NotBegun, "still importing"),
        late(Starved, "no memory"),
    ],
)
def test_what_only_the_suite_was_too_slow_for_is_an_error(error: Exception):
    assert judge("call", error).verdict == ERROR


def test_a_process_that_has_died_comes_before_how_the_suite_found_out():
    process = SimpleNamespace(
        name="engine-1", log_path="", tail=lambda: "", preparing=lambda call: "", stalled_s=lambda: 0.0
    )
    for last in (late(ProcessDied, ""), raised("WorkerError", "no peer")):
        calls = [Call(process, what) for what in ("connect()", "accept()")]
        calls[0].finish(error=raised("SuiteFault", "no engine listens"))
        calls[1].finish(error=last)
        with pytest.raises((ProcessDied, RemoteError)) as caught:
            gather(calls, 1)
        expected = FAIL if isinstance(last, ProcessDied) else ERROR
        assert judge("call", caught.value).verdict == expected


GONE = raised("LinkError", "the engine is gone", "trainer-rank0", echo=True)


@pytest.mark.parametrize(
    ("in_time", "hangs", "chosen"),
    [
        ([raised("SuiteFault", "nothing came"), raised("WorkerError", "no peer")], False, 0),
        ([raised("WorkerError", "no peer"), raised("SuiteFault", "no memory")], False, 1),
        ([raised("WorkerError", "no peer"), raised("Refused", "no memory")], False, 1),
        ([raised("WorkerError", "first"), raised("NotAnnounced", "then")], False, 0),
        ([GONE, raised("WorkerError", "no room")], False, 1),
        ([GONE, late(ProcessDied, "")], False, 1),
        ([raised("WorkerError", "no peer"), late(ProcessDied, "")], False, 0),
        ([GONE], True, "hangs"),
        ([raised("WorkerError", "no room")], True, 0),
        ([GONE], False, 0),
    ],
)
def test_of_several_failures_that_is_told_which_the_others_may_come_from(
    in_time: list[Exception], hangs: bool, chosen: int | str
):
    """What only says that the other side is gone, or waits for it, comes last; the suite's own fault, first."""
    process = SimpleNamespace(
        stalled_s=lambda: 0.0,
        name="engine-1",
        log_path="",
        tail=lambda: "",
        preparing=lambda call: "",
        write_stacks=lambda: None,
    )
    calls = [Call(process, "update()") for _ in [*in_time, *([None] if hangs else [])]]
    for call, error in zip(calls, in_time, strict=False):
        call.finish(error=error)
    with pytest.raises((ProcessDied, RemoteError, DeadlineExceeded)) as caught:
        gather(calls, 0.2, after_failure_s=0.1)
    if chosen == "hangs":
        assert isinstance(caught.value, DeadlineExceeded)
    else:
        assert caught.value is in_time[chosen]


def test_the_cause_is_the_same_in_another_case_and_another_process():
    first = judge("call", raised("WorkerError", "update_weight: rank 0: RuntimeError: no\nmore", "engine-1"))
    second = judge("call", raised("WorkerError", "update_weight: rank 0: RuntimeError: no\nother", "engine-2"))
    assert first.cause == second.cause == "WorkerError: update_weight: rank 0: RuntimeError: no"
    assert first.detail != second.detail


def test_the_cause_of_a_sequence_is_that_of_the_step_that_failed():
    error = AssertionError("after: update(seed=1)")
    error.__cause__ = raised("WorkerError", "no")
    assert judge("call", error).cause == "WorkerError: no"


def test_the_cause_of_an_assertion_leaves_the_case_out():
    error = AssertionError("expected one, found two [subject=broadcast stage=cpu-tp1 model=m]")
    assert judge("call", error).cause == "expected one, found two"


def test_a_pass_has_no_cause():
    assert judge("call", None) == Judgement()


@pytest.mark.parametrize(
    ("verdict", "writes"), [(PASS, 1), (FAIL, 1), (ERROR, 1), (UNSUPPORTED, 1), (NOT_APPLICABLE, 0)]
)
def test_what_is_not_applicable_waits_for_the_next_write(monkeypatch: pytest.MonkeyPatch, verdict: str, writes: int):
    written: list[int] = []
    record = SimpleNamespace(conformance=[], write=lambda: written.append(len(record.conformance)))
    state = SimpleNamespace(record=record, verdicts=Counter(), waivers=None)
    for name, given in {"params_of": {}, "requirement_of": "update.exact", "_entry": {"verdict": verdict}}.items():
        monkeypatch.setattr(judging, name, lambda *_, given=given: given)
    judging._put_down(None, state, SimpleNamespace(judgement=Judgement(verdict, "")))
    assert record.conformance == [{"verdict": verdict}]
    assert written == [1] * writes
