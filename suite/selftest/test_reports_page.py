"""The pages as a browser shows them: complete, without a script, a console error or a request, and inert to markup."""

import contextlib
import copy
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports
from reports import load, page
from reports.__main__ import main
from reports.load import UnusableInput
from suite.selftest import reports_data as data
from suite.selftest.properties import examples
from suite.selftest.test_reports_load import PLACES, changed, json_values

DEADLINE_S = 60
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</style></svg>"
VERSIONS = ("0.20.2", "0.24.0", "0.26.0", "0.33.0")


def browse(file: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the browser over one page; it and its children are gone when this returns."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={file.parent / 'profile'}", *flags, file.as_uri()]
    pipe = subprocess.PIPE
    browser = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, log = browser.communicate(timeout=DEADLINE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(browser.pid, signal.SIGKILL)
    assert browser.returncode == 0, log
    return subprocess.CompletedProcess(command, 0, out, log)


def with_markup() -> dict:
    """A run in which every name and message is markup."""
    document = data.run("0.26.0")
    for entry in document["conformance"]:
        entry |= {name: f"{entry[name]}{MARKUP}" for name in ("requirement", "subject", "stage", "model", "detail")}
        entry["text"] = entry["cause"] = MARKUP
    document["conformance"][0] |= {"verdict": "waived", "waiver_issue": MARKUP, "waiver_reason": MARKUP}
    document["stale_waivers"] = [MARKUP]
    for entry in document["benchmarks"]:
        entry["extra_info"] |= {name: f"{entry['extra_info'][name]}{MARKUP}" for name in ("subject", "stage", "model")}
        entry["extra_info"]["roofline_kind"] = MARKUP
        entry["extra_info"]["steps_s"] = {f"begin {MARKUP}": [0.1, 0.2]}
        entry["extra_info"]["parts_s"] = {f"gather {MARKUP}": [0.1, 0.2]}
        entry["group"] = MARKUP
    document["environment"] |= {"torch": MARKUP, "vllm": {"version": f"0.26.0{MARKUP}"}, "packages": {MARKUP: MARKUP}}
    document["environment"]["pace"] = data.pace((f"gpu-split{MARKUP}",), 1)
    document["timeline"][0]["what"] = MARKUP
    return document


def pages(directory: Path, *documents: dict) -> dict[str, Path]:
    """The three kinds of page, made of these runs."""
    files = [str(data.write(document, directory / f"{number}.json")) for number, document in enumerate(documents)]
    made = {kind: directory / f"{kind}.html" for kind in ("run", "compare", "trend")}
    reports.write_html(documents[0], made["run"])
    main(["compare", files[0], files[-1], "--html", str(made["compare"])])
    main(["trend", *files, "--html", str(made["trend"])])
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    documents = [data.run(vllm, seed=seed, slower=1 + seed / 10) for seed, vllm in enumerate(VERSIONS)]
    return pages(tmp_path_factory.mktemp("pages"), *reversed(documents))


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return pages(tmp_path_factory.mktemp("marked"), with_markup(), with_markup())


def requested(log: Path) -> list[str]:
    """What a page asked the network for; the browser's own errands have no origin."""
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = [params for params in asked if params.get("initiator", "not an origin") != "not an origin"]
    return [params["url"] for params in asked if not params["url"].startswith(("file:", "data:"))]


class Elements(html.parser.HTMLParser):
    """What a page is made of: tags, ids, and everything that could load something."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags, self.ids, self.loads, self.handlers = set(), [], [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loads.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


@pytest.mark.parametrize("kind", ["run", "compare", "trend"])
def test_a_page_loads_nothing_and_runs_nothing(made, marked, kind):
    for file in (made[kind], marked[kind]):
        found, text = Elements(file), file.read_text(encoding="utf-8")
        assert not found.tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
        assert all(load.startswith("#") or load == "data:," for load in found.loads)
        assert not found.handlers
        assert len(found.ids) == len(set(found.ids))
        assert not re.search(r"@import|url\((?!#)", text)
        assert "default-src 'none'" in text


@needs_browser
@pytest.mark.parametrize("kind", ["run", "compare", "trend"])
def test_a_page_renders_without_error_or_request(made, kind, tmp_path):
    log = tmp_path / "net.json"
    shot = made[kind].with_suffix(".png")
    done = browse(made[kind], f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=1280,1600")
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 50_000, "an empty page compresses to less"
    assert requested(log) == []


@needs_browser
def test_a_request_would_be_seen(tmp_path):
    file, log = tmp_path / "asks.html", tmp_path / "net.json"
    file.write_text('<!doctype html><img src="http://example.invalid/a.png">')
    browse(file, f"--log-net-log={log}", "--dump-dom")
    assert requested(log) == ["http://example.invalid/a.png"]


@needs_browser
@pytest.mark.parametrize("kind", ["run", "compare", "trend"])
def test_markup_in_names_stays_text(marked, kind):
    done = browse(marked[kind], "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert "&lt;script&gt;alert(1)" in done.stdout
    assert "<script" not in done.stdout
    assert "<img" not in done.stdout


@needs_browser
def test_a_page_is_dark_where_the_reader_likes_it_dark_and_white_on_paper(made):
    colours = {}
    for scheme, flags in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
        shot = made["run"].with_name(f"{scheme}.png")
        browse(made["run"], f"--screenshot={shot}", "--window-size=600,800", *flags)
        colours[scheme] = corner(shot)
    assert min(colours["light"]) > 240
    assert max(colours["dark"]) < 40
    pdf = made["run"].with_suffix(".pdf")
    browse(made["run"], f"--print-to-pdf={pdf}", "--blink-settings=preferredColorScheme=0")
    assert pdf.read_bytes().startswith(b"%PDF")


@needs_browser
def test_a_page_fits_a_phone(made):
    # Only a table may be wider than the screen, and it scrolls in its own box.
    for kind, file in made.items():
        probe = file.with_name(f"probe-{kind}.html")
        inside = file.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
        script = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join()</script>"
        probe.write_text(inside.replace("</body>", f"{script}</body>"))
        shown = browse(probe, "--dump-dom", "--window-size=390,844").stdout
        wide, screen = re.search(r"<title>(\d+),(\d+)", shown).groups()
        assert int(screen) <= 500
        assert int(wide) <= int(screen), kind


def corner(png: Path) -> tuple[int, ...]:
    from PIL import Image  # comes with matplotlib

    return Image.open(png).convert("RGB").getpixel((2, 2))


def test_the_page_says_the_verdict_first_and_holds_every_message():
    content = page.run_page(load.parse(data.run("0.26.0"), "run.json"))
    assert content.index("1 of 31 requirements not met") < content.index("<h2>")
    assert content.count("<details>") == 4 + 4 + 6
    assert "12 of 32768 elements differ after update 2 [subject=broadcast stage=gpu-split" in content
    assert "Time went to: starting 181 s" in content
    assert content.count('<svg role="img"') == 4


def test_a_stage_that_could_not_be_held_has_no_column_and_its_reason():
    document = data.run(stages=data.CPU_STAGES)
    for subject in data.SUBJECTS:
        said = ("not-applicable", "gpu-split: needs 2 whole GPUs, found 0")
        document["conformance"].append(data.outcome("update.exact", subject, "gpu-split", None, *said))
    shown = page.run_page(load.parse(document, "run.json"))
    assert ">gpu-split</th>" not in shown
    assert ">cpu-tp2</th>" in shown
    assert "2 cases that could not run" in shown
    document["conformance"].pop()
    assert "1 case that could not run" in page.run_page(load.parse(document, "run.json"))
    assert "<li>2 x gpu-split: needs 2 whole GPUs, found 0</li>" in shown
    for entry in document["conformance"]:
        entry["verdict"] = "not-applicable"
    assert ">gpu-split</th>" in page.run_page(load.parse(document, "run.json")), "or there would be no table"


def test_plots_follow_the_colours_of_the_page():
    content = page.run_page(load.parse(data.run(), "run.json"))
    drawn = "".join(re.findall(r"<svg.*?</svg>", content, re.DOTALL))
    assert "var(--series-1)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()


def test_the_same_run_gives_the_same_page():
    pages = {page.run_page(load.parse(data.run(), "run.json")) for _ in range(2)}
    assert len(pages) == 1


@pytest.mark.parametrize("part", ["conformance", "benchmarks", "environment", "timeline"])
def test_a_run_cut_short_has_a_page(tmp_path, part):
    document = data.run()
    del document[part]
    content = reports.write_html(document, tmp_path / "report.html").read_text()
    assert content.rstrip().endswith("</html>")


def small_run() -> dict:
    document = data.run(stages=data.CPU_STAGES)
    return document | {"conformance": document["conformance"][:2], "benchmarks": document["benchmarks"][:2]}


@examples(0.25)
@given(st.sampled_from(PLACES), json_values)
def test_whatever_is_read_is_shown(path, value):
    try:
        run = load.parse(changed(path, value, small_run()), "edited")
    except UnusableInput:
        return
    page.run_page(run)


@examples(0.04)
@given(st.lists(st.sampled_from([1e-300, 1e-9, 0.0, 1.0, 1e12, 1e299]), min_size=1, max_size=3), st.text(max_size=30))
def test_extreme_samples_and_names_are_shown(samples, name):
    document = copy.deepcopy(small_run())
    document["benchmarks"][0]["stats"] = {"data": samples}
    document["benchmarks"][0]["extra_info"] |= {"model": name, "stage": name, "bytes_sent": samples[0]}
    document["conformance"][0] |= {"subject": name, "detail": name}
    document = json.loads(json.dumps(document))
    run = load.parse(document, "extreme")
    page.run_page(run)
    page.trend_page([run, run], 0.05)
    reports.render_text(document)
