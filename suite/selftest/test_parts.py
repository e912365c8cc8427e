"""The parts of an update follow each other and are the whole of it, and a run's report says what each took."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from reports import page, spent, text
from reports.load import parse
from suite.driver.measuring import Measuring
from suite.driver.moving import Moved
from suite.driver.parts import moments, parts_of
from suite.selftest.reports_data import run

STEPS_S = {"begin": 0.25, "transfer": 4.0, "end": 1.0}
ENGINE = {"started_s": 9.5, "ended_s": 17.0, "steps_s": STEPS_S}
TRAINER = {"started_s": 10.0, "ended_s": 17.5, "announced_s": 11.0, "announce_s": 0.5}
OVER_S = moments(ENGINE, TRAINER, 9.5, 17.5)
WORKERS = [
    {"begun": 12.5, "check": 12.75, "copy": 15.0},
    {"begun": 12.25, "check": 12.5, "copy": 15.5},
]


def test_parts_follow_each_other_and_are_the_whole():
    found = parts_of(OVER_S, [])
    assert found == {"gather": 1.0, "announce": 0.5, "agree": 1.0, "transfer": 4.0, "end": 1.0, "hear": 0.5}
    assert sum(found.values()) == 17.5 - 9.5


def test_a_worker_that_says_when_its_parts_were_over_is_seen_inside_of_the_transfer():
    found = parts_of(OVER_S, WORKERS)
    inside = {"call": 0.25, "check": 0.25, "copy": 3.0, "answer": 0.5}  # of the worker that was done last
    assert [*found.items()][3:7] == [*inside.items()]
    assert sum(found.values()) == 17.5 - 9.5


@pytest.mark.parametrize("workers", [[{}], [WORKERS[0], {}]])
def test_where_a_worker_can_not_say_the_transfer_is_one_part(workers: list[dict]):
    assert parts_of(OVER_S, workers) == parts_of(OVER_S, [])


@pytest.mark.parametrize(("can", "over_s", "asked"), [(True, OVER_S, 1), (False, OVER_S, 0), (True, {}, 0)])
def test_workers_are_asked_where_the_extension_can_say_and_one_engine_was_updated(can: bool, over_s: dict, asked: int):
    calls: list[str] = []

    def call(rpc: str, method: str, deadline_s: float) -> list[dict]:
        calls.append(method)
        return WORKERS

    sync: Any = SimpleNamespace(
        subject=SimpleNamespace(can=lambda method: can), engines=[SimpleNamespace(process=SimpleNamespace(call=call))],
        call_deadline_s=1.0, _call=lambda engine, method: call("rpc", method, 1.0),
    )  # fmt: skip
    found = Measuring.parts(sync, Moved(8.0, 8, 1, STEPS_S, 1, over_s=over_s))
    assert calls == ["update_times"] * asked
    assert found == (parts_of(over_s, WORKERS if can else []) if over_s else {})


def reported(parts_s: object) -> str:
    document = run()
    document["benchmarks"][0]["extra_info"]["parts_s"] = parts_s
    return text.run_text(parse(document, "run.json"))


def test_the_report_has_the_median_of_each_part():
    shown = reported({"gather": [0.001, 0.003, 0.002], "transfer": [0.0041] * 3})
    assert spent.TITLE in shown
    assert "gather 2.00 ms, transfer 4.10 ms" in shown


def test_the_page_has_a_column_for_each_part_in_the_order_of_an_update():
    document = run()
    whole = {"gather": [0.001], "transfer": [0.004], "end": [0.002]}
    inside = {"gather": [0.001], "call": [0.001], "answer": [0.003], "end": [0.002]}
    for benchmark, parts_s in zip(document["benchmarks"], (whole, inside), strict=False):
        benchmark["extra_info"]["parts_s"] = parts_s
    found = parse(document, "run.json")
    head, rows = spent.table(found.timings)
    assert head == ("subject", "stage", "model", "gather", "call", "answer", "transfer", "end")
    assert [row[3:] for row in rows] == [
        ("1.00 ms", "-", "-", "4.00 ms", "2.00 ms"),
        ("1.00 ms", "1.00 ms", "3.00 ms", "-", "2.00 ms"),
    ]
    shown = page.run_page(found)
    assert spent.TITLE in shown
    assert re.search(r'<th scope="col">answer</th><th scope="col">transfer</th>', shown)
    assert spent.TITLE not in page.run_page(parse(run(), "run.json"))


def test_a_run_without_parts_has_no_such_section():
    assert spent.TITLE not in text.run_text(parse(run(), "run.json"))
