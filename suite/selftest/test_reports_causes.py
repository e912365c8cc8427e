"""Failures of one subject with one cause are told once, the first in full and the others counted."""

import copy

import pytest

import reports
from reports import load, page
from reports.__main__ import main
from suite.selftest import reports_data as data

RUN = data.run(stages=data.CPU_STAGES)
MANY = ("update.exact", "update.order", "errors.shape")
CAUSE = "ValueError: expected [256, 4], found [256, 1, 4]"


def failing(cause: str | None, detail: str = "{}", verdict: str = "fail", subject: str = "broadcast") -> dict:
    """A run in which MANY requirements fail on both stages; `{}` in the message stands for the requirement's name."""
    made = copy.deepcopy(RUN)
    for entry in made["conformance"]:
        if entry["requirement"] in MANY and entry["subject"] == subject:
            entry |= {"verdict": verdict, "detail": detail.format(entry["requirement"])}
            entry |= {"cause": cause} if cause else {}
    return made


def told(made: dict) -> str:
    return " ".join(reports.render_text(made).split())


@pytest.mark.parametrize("verdict", ["fail", "error", "waived"])
def test_a_named_cause_is_told_once(verdict):
    shown = told(failing(CAUSE, "{}: the engine refused", verdict))
    assert shown.count(CAUSE) == 1
    head = f"{verdict} MUST update.exact: broadcast cpu-tp1 qwen3-tied-tiny"
    assert head in shown
    assert (
        f"{CAUSE} update.exact: the engine refused and 5 more: update.exact, update.order (2), errors.shape (2)"
        in shown
    )
    assert "update.order: the engine refused" not in shown


def test_without_a_named_cause_the_first_line_of_the_message_is_it():
    shown = told(failing(None, f"{CAUSE}\nwhile judging {{}}"))
    assert f"{CAUSE} while judging update.exact and 5 more: update.exact, update.order (2)" in shown
    assert shown.count(CAUSE) == 1


def test_a_cause_that_the_message_says_already_is_not_said_twice():
    assert told(failing(CAUSE, f"{CAUSE} in {{}}")).count(CAUSE) == 1


def test_a_cause_of_the_messages_own_words_is_not_said_twice():
    cause = "AssertionError: expected 3 weights, found 4 after update 2"
    detail = "expected 3 weights, found 4 after update 2 [subject=broadcast stage=cpu-tp1 model=tiny]; see {}"
    assert told(failing(cause, detail)).count("expected 3 weights, found 4") == 1
    assert told(failing(cause, "it broke in {}")).count(cause) == 1


@pytest.mark.parametrize("found", ["no prefix", "weights " * 50])
def test_what_was_expected_and_found_is_told_in_lines_and_not_in_a_sentence_too(found):
    found = found.strip()
    cause = f"expected one prefix, found {found}"[:300]
    made = failing(cause, f"expected: one prefix\nfound: {found} [subject=a stage=b]\nwhere: {{}}")
    assert "expected one prefix" not in told(made)
    assert "expected: one prefix found: " in told(made)
    assert "expected one prefix" in told(failing(cause, f"expected: two prefixes\nfound: {found}\nwhere: {{}}"))


def test_a_reason_that_is_a_sentence_is_joined_to_its_thread():
    made = failing(None, "broke", "waived")
    for entry in made["conformance"]:
        entry |= {"waiver_reason": "Nothing is written.", "waiver_issue": "https://example.org/7"}
    assert "waived: Nothing is written, https://example.org/7" in told(made)


def test_other_causes_subjects_and_verdicts_stay_apart():
    made = failing(CAUSE)
    for entry in failing(CAUSE, subject="colocate")["conformance"]:
        if entry["subject"] == "colocate" and entry["verdict"] == "fail":
            place = next(i for i, e in enumerate(made["conformance"]) if e["nodeid"] == entry["nodeid"])
            made["conformance"][place] = entry
    different = [entry for entry in made["conformance"] if entry["verdict"] == "fail"]
    different[0]["cause"] = "KeyError: 'lm_head.weight'"
    different[1]["verdict"] = "error"
    shown = told(made)
    assert shown.count(CAUSE) == 3
    assert shown.count(" and 3 more: update.order, errors.shape (2)") == 1
    assert shown.count(" and 5 more: ") == 1
    assert "KeyError: 'lm_head.weight'" in shown


def test_failures_that_say_nothing_have_no_cause_in_common():
    shown = told(failing(None, ""))
    assert shown.count("no message and 1 more:") == len(MANY)


def test_failures_with_other_waivers_stay_apart():
    made = failing(CAUSE, verdict="waived")
    waived = [entry for entry in made["conformance"] if entry["verdict"] == "waived"]
    for entry in waived:
        entry |= {"waiver_issue": "https://example.org/7", "waiver_reason": "packs twice"}
    waived[0]["waiver_reason"] = "drops biases"
    shown = told(made)
    assert "waived: drops biases, https://example.org/7 " in shown
    assert f"waived: packs twice, https://example.org/7 {CAUSE} update.exact and 4 more: " in shown


def test_the_page_tells_a_cause_once_and_counts_the_rest():
    shown = page.run_page(load.parse(failing(CAUSE, "{}: the engine refused"), "run.json"))
    told = shown[shown.index("What failed") : shown.index("<h2>Throughput")]
    assert told.count("ValueError: expected [256, 4]") == 1
    assert "and 5 more: update.exact, update.order (2), errors.shape (2)" in told
    assert '<div class="print">' not in told


def test_a_comparison_tells_a_cause_once_and_counts_the_rest(tmp_path, capsys):
    made = failing(CAUSE, "{}: the engine refused")
    files = [str(data.write(one, tmp_path / f"{number}.json")) for number, one in enumerate((RUN, made))]
    written = {kind: tmp_path / f"c.{kind}" for kind in ("html", "markdown", "junit")}
    options = [option for kind, file in written.items() for option in (f"--{kind}", str(file))]
    assert main(["compare", *files, *options]) == 1
    out = " ".join(capsys.readouterr().out.split())
    more = "and 5 more: update.exact, update.order (2), errors.shape (2)"
    assert f"Worse: 6 newly failing. A {files[0]}" in out
    assert "Newly failing: ✗ update.exact broadcast cpu-tp1 qwen3-tied-tiny (pass -> fail)" in out
    assert f"{CAUSE} update.exact: the engine refused {more}" in out
    assert out.count(CAUSE) == 1
    table = written["html"].read_text().replace("<wbr>", "")
    assert table.count(more) == 2, "expected it in the table and, for print, below"
    assert table.count("the engine refused") == 2
    assert written["markdown"].read_text().replace("\\", "").count(more) == 1
    assert written["junit"].read_text().count("<failure") == 6, "expected other programs to get every case"


def test_what_both_runs_fail_for_one_cause_is_told_once_too(tmp_path, capsys):
    made = failing(CAUSE, "{}: the engine refused")
    files = [str(data.write(made, tmp_path / f"{number}.json")) for number in (0, 1)]
    assert main(["compare", *files]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Still failing: ✗ update.exact broadcast cpu-tp1" in out
    assert out.count("and 5 more: ") == 1


def test_a_change_of_the_number_of_cases_is_told_by_each(tmp_path, capsys):
    before, after = failing(CAUSE), failing(CAUSE)
    before["conformance"] += [entry | {"nodeid": "again"} for entry in before["conformance"] if "cause" in entry]
    files = [str(data.write(made, tmp_path / f"{number}.json")) for number, made in enumerate((before, after))]
    main(["compare", *files])
    assert capsys.readouterr().out.count("cases before: 2 fail; now: 1 fail") == 6
