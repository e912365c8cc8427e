"""A failure's message says what was expected, found, where and how to repeat it, a line each, wherever it is shown."""

import copy
import re

import pytest

import reports
from reports import load, page
from reports.__main__ import main
from reports.message import message_text, parts
from suite.selftest import reports_data as data

RUN = data.run(stages=data.CPU_STAGES)
REPEAT = "pytest suite/conformance/test_update.py -k 'test_exact and broadcast-cpu-tp1-qwen3-tied-tiny' --tb=short"
DETAIL = (
    "expected: the weights of an engine cold-loaded from checkpoint 1\n"
    "found: 19 weights that differ on rank 0: model.embed_tokens.weight: 65536 of 65536 elements differ\n"
    "where: after update 2 [subject=broadcast stage=cpu-tp1 model=qwen3-tied-tiny]"
)


def failing(detail: str = DETAIL, verdict: str = "fail", **more: str) -> dict:
    """A run in which the first case of update.exact fails."""
    made = copy.deepcopy(RUN)
    entry = next(entry for entry in made["conformance"] if entry["requirement"] == "update.exact")
    entry |= {"verdict": verdict, "detail": detail, **more}
    return made


def test_the_terminal_has_a_line_for_each():
    lines = reports.render_text(failing(repeat=REPEAT, text="After an update, every weight equals.")).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("✗ fail MUST update.exact"))
    assert lines[start + 1 : start + 7] == [
        "    clause:   After an update, every weight equals.",
        "    expected: the weights of an engine cold-loaded from checkpoint 1",
        "    found:    19 weights that differ on rank 0: model.embed_tokens.weight: 65536 of 65536 elements",
        "              differ",
        "    where:    after update 2 [subject=broadcast stage=cpu-tp1 model=qwen3-tied-tiny]",
        f"    repeat:   {REPEAT}",
    ]


def test_a_long_line_is_shortened_and_leaves_the_others_whole():
    shown = message_text(DETAIL.replace("65536 of 65536 elements differ", "many; " * 200), 100)
    assert shown.count("many") < 100
    assert " ..." in shown
    assert shown.splitlines()[-1].startswith("    where:    after update 2")
    assert max(map(len, shown.splitlines())) <= 100


def test_a_message_without_labels_is_shown_as_before():
    told = "update.exact broke: expected 3, found 4\nwhere it broke nobody knows"
    assert parts(told) == [("", line) for line in told.split("\n")]
    assert message_text(told, 100) == "\n".join(f"    {line}" for line in told.split("\n"))


@pytest.mark.parametrize(("verdict", "shown"), [("fail", 1), ("error", 1), ("waived", 1), ("unsupported", 0)])
def test_what_failed_can_be_repeated(verdict, shown):
    made = failing(verdict=verdict, repeat=REPEAT)
    assert reports.render_text(made).count(REPEAT) == shown


def test_the_page_has_a_line_for_each():
    shown = page.run_page(load.parse(failing(repeat=REPEAT, text="After an update, all <equal>."), "run.json"))
    told = {
        "clause": "After an update, all &lt;equal&gt;.",
        "expected": "the weights of an engine cold-loaded from checkpoint 1",
        "repeat": REPEAT.replace("'", "&#39;"),
    }
    for label, words in told.items():
        assert f"<b>{label}</b> <span>{words}</span>" in shown


def test_a_comparison_has_a_line_for_each(tmp_path, capsys):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    data.write(RUN, before)
    data.write(failing(repeat=REPEAT), after)
    assert main(["compare", str(before), str(after), "--html", str(tmp_path / "c.html")]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^    expected: the weights of an engine cold-loaded from checkpoint 1$", out, re.MULTILINE)
    assert f"    repeat:   {REPEAT}\n" in out
    assert "<b>found</b> <span>19 weights that differ" in (tmp_path / "c.html").read_text()


def test_what_was_expected_and_found_is_the_cause_where_none_is_named():
    made = failing()
    cases = [entry for entry in made["conformance"] if entry["requirement"] == "update.order"]
    cases[0] |= {"verdict": "fail", "detail": DETAIL.replace("after update 2", "after update 9")}
    cases[1] |= {"verdict": "fail", "detail": DETAIL.replace("19 weights", "20 weights")}
    shown = " ".join(reports.render_text(made).split())
    assert "and 1 more: update.order" in shown
    assert "20 weights that differ" in shown
    assert "after update 9" not in shown
