"""pytest's side of the suite: options, cases, verdicts, artefacts and the closing summary."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from suite.driver.patience import GivenUp
from suite.models import MODELS
from suite.processes.process import Run
from suite.session import environment, selection, verdicts
from suite.session.record import JUNIT, LOGS, Record
from suite.session.selection import NOTHING, MissingStage, Selection
from suite.session.verdicts import Judgement
from suite.session.waivers import Case, Ledger, Waiver
from suite.stages import Stage
from suite.subjects import Subject

SELFTESTS = Path(__file__).resolve().parent / "selftest"
LOG_LINES = 40
TRIED = pytest.StashKey[dict[str, int]]()  # what a test has tried and how often, for run.json
MEASURING = "benchmark"  # what stands for the requirement where a measurement failed
SUMMARY_COLUMNS = 100
PHASES = ("alone", "ends_engine", "benchmark")  # the markers of what comes after the rest, in this order
MARKERS = (
    "cpu: judges or measures an engine on this machine's CPU",
    "gpu: judges or measures an engine on GPUs",
    "benchmark: measures; its data is verified before it is timed",
    "selftest: tests the suite itself",
    "requirement(id, models=None): the requirement that a test judges, and the models it is judged with",
    "engine(**options): arguments of vllm.LLM for the engines of a test",
    "alone: judges what engines that start or end beside it would change; comes after what judges otherwise",
    "ends_engine: leaves an engine that no other test can use; comes after all that judge",
    "models(cpu=[...], gpu=[...]): the models that a test takes, by the kind or the name of the stage",
)

_started_s = time.monotonic()
_speaking = threading.Lock()


@dataclass
class Progress:
    """How a test is doing."""

    began_s: float = field(default_factory=time.monotonic)
    duration_s: float = 0.0
    judgement: Judgement = field(default_factory=Judgement)
    waiver: Waiver | None = None


@dataclass
class State:
    """What one session of pytest holds; `examining` says whether anything but selftests may run."""

    config: pytest.Config
    examining: bool
    record: Record | None = None
    run: Run | None = None
    selection: Selection | None = None
    waivers: Ledger | None = None
    progress: dict[str, Progress] = field(default_factory=dict)
    verdicts: Counter[tuple[bool, str]] = field(default_factory=Counter)  # (whether on a stage, verdict)


_state: State | None = None


def announce(text: str) -> None:
    """Write a line to the terminal at once, whatever is being captured; from any thread."""
    terminal = _state and _state.config.pluginmanager.get_plugin("terminalreporter")
    if terminal:
        with _speaking:
            terminal.write_line(f"{time.monotonic() - _started_s:7.1f} s  {text}")
            terminal.flush()


def current_selection() -> Selection:
    """The subjects, stages and models of this session. Raises RuntimeError where nothing is examined."""
    if _state is None or _state.selection is None:
        raise RuntimeError("there is no selection: this session of pytest runs nothing but selftests")
    return _state.selection


def timeline(what: str, name: str) -> AbstractContextManager[None]:
    """Put down in run.json how long the block takes: "starting", "moving" or "judging", and what."""
    return _state.record.span(what, name) if _state and _state.record else contextlib.nullcontext()


# ---- options and configuration


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("weight sync")
    group.addoption("--subject", action="append", default=[], metavar="NAME", help="examine this subject (repeatable)")
    group.addoption(
        "--extension", action="append", default=[], metavar="PKG.MODULE:CLASS",
        help="examine this worker extension class, alone or beside --subject (repeatable)",
    )  # fmt: skip
    group.addoption("--model", action="append", default=[], metavar="NAME", help="use this model only (repeatable)")
    group.addoption("--stage", action="append", default=[], metavar="NAME", help="use this stage only (repeatable)")
    group.addoption(
        "--waivers", default=None, metavar="FILE", help="TOML file of known failures, which do not fail the run"
    )
    group.addoption(
        "--sequences", type=int, default=4, metavar="N", help="update.sequence: play so many sequences (default: 4)"
    )
    group.addoption(
        "--sequence-steps", type=int, default=20, metavar="N", help="update.sequence: of so many steps (default: 20)"
    )
    group.addoption(
        "--play", metavar="STEPS", help="update.sequence: play this sequence, as a failure's message has it"
    )
    group.addoption("--report", default=None, metavar="DIR", help="where the artefacts go (default: reports/latest)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    global _state
    _state = State(config, examining=not _selftests_only(config))
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.option.benchmark_quiet = True  # its table knows nothing of bytes and rooflines: the summary does
    if _state.examining and not config.option.collectonly:
        directory = Path(config.getoption("report") or config.rootpath / "reports" / "latest").resolve()
        _state.record = Record(directory, config)
        config.option.xmlpath = config.option.xmlpath or str(directory / JUNIT)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that name nothing, and free the terminal reporter from pytest's capturing."""
    if _state.examining:
        _state.selection = selection.select(session.config)
        _state.waivers = selection.ledger(session.config, _state.selection)
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if terminal._tw._file is sys.stdout:
            descriptor = os.dup(sys.stdout.fileno())
            terminal._tw._file = os.fdopen(descriptor, "w", 1, encoding="utf-8", errors="backslashreplace")


def pytest_unconfigure() -> None:
    global _state
    if _state and _state.run:
        _state.run.close()
    _state = None


def _end(number: int, _: object) -> None:
    pytest.exit(f"ended by {signal.Signals(number).name}", returncode=pytest.ExitCode.INTERRUPTED)


def _selftests_only(config: pytest.Config) -> bool:
    paths = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    below = bool(paths) and all(SELFTESTS in (path, *path.parents) for path in paths)
    return below or config.option.markexpr == "selftest"


# ---- collection


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Selftests run when asked for, by path or by marker."""
    asked = config.args_source != pytest.Config.ArgsSource.TESTPATHS or "selftest" in config.option.markexpr
    return True if collection_path == SELFTESTS and not asked else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _examines(metafunc.definition):
        selection.parametrize(metafunc, _state.selection)
        if _state.waivers:
            _state.waivers.expect(selection.possible(metafunc, _state.selection))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Drop what nothing was asked of, mark the rest, and bring those that share engines together."""
    idle = [item for item in items if NOTHING in _params(item).values()]
    config.hook.pytest_deselected(items=idle)
    items[:] = [item for item in items if item not in idle]
    for item in items:
        if SELFTESTS in item.path.parents:
            item.add_marker("selftest")
        if _examines(item) and "stage" not in _params(item):
            for kind in selection.KINDS:
                if environment.lacks_engine(kind) is None or environment.vllm() == (None, None):
                    item.add_marker(kind)
    collected = {item.nodeid: index for index, item in enumerate(items)}
    yield
    items.sort(key=lambda item: (*_place(item), collected[item.nodeid]))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if _state.waivers:
        _state.waivers.due.update(filter(None, map(_case, items)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if _state.waivers:
        _state.waivers.due.update(filter(None, map(_case, session.items)))
        _state.waivers.whole &= not session.testsfailed  # what could not be collected is left out
    if _state.record and _any_examine(session.items):
        _state.record.begin()


def _examines(item: pytest.Item) -> bool:
    """Whether a test judges a requirement or measures, and so needs an engine."""
    marked = any(item.get_closest_marker(name) for name in ("requirement", "models", "benchmark"))
    return marked and SELFTESTS not in item.path.parents


def _any_examine(items: list[pytest.Item]) -> bool:
    return any(_examines(item) for item in items)


def _params(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


def _case(item: pytest.Item) -> Case | None:
    """What a test judges; None for one that judges no requirement."""
    if NOTHING in _params(item).values() or not _examines(item) or not (requirement := selection.requirement_of(item)):
        return None
    return Case(requirement.id, *(name or "" for name in _names(item).values()))


def _names(item: pytest.Item) -> dict[str, str | None]:
    """The subject, stage and model of a test by name; None for what it does not take."""
    params = _params(item)
    return {name: getattr(params.get(name), "name", params.get(name)) for name in ("subject", "stage", "model")}


def _place(item: pytest.Item) -> tuple[int, ...]:
    """Selftests first, then what needs no stage, while engines start; then phase by phase, stage and model."""
    if SELFTESTS in item.path.parents:
        return (0, 0, 0, 0)
    names = _names(item)
    examined = _state.selection
    stages = [None, *examined.stages, *examined.missing] if examined else []
    return (1, _phase(item), _index(stages, names["stage"]), _index([*MODELS], names["model"]))


def _phase(item: pytest.Item) -> int:
    """What ends engines comes when they have served, and measuring when there are none left that would disturb it."""
    return next((number for number, name in enumerate(PHASES, 1) if item.get_closest_marker(name)), 0)


def _index(names: list[str | None], name: str | None) -> int:
    return names.index(name) if name in names else len(names)


# ---- running


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave the host's name out: a report can be handed on."""
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run that engine and trainer processes belong to; ended with the session."""
    logs = _state.record.directory / LOGS if _state.record else tmp_path_factory.mktemp("run") / LOGS
    _state.run = Run(logs)
    yield _state.run
    _state.run.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End what cannot be judged before any fixture starts a process for it."""
    _state.progress[item.nodeid] = Progress()
    if not _examines(item):
        return
    params, requirement = _params(item), selection.requirement_of(item)
    if "stage" not in params and environment.vllm() == (None, None):
        verdicts.not_applicable(environment.lacks_engine("cpu"))
    if isinstance(params.get("stage"), MissingStage):
        verdicts.not_applicable(f"{params['stage'].name}: {params['stage'].reason}")
    subject = params.get("subject")
    if isinstance(params.get("stage"), Stage) and isinstance(subject, Subject):
        reason = subject.unfit(params["stage"])
        if reason:
            verdicts.not_applicable(reason)
    if requirement and isinstance(subject, Subject) and requirement.id in subject.lacks:
        verdicts.unsupported(subject.lacks[requirement.id])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with timeline("judging", item.name) if _examines(item) else contextlib.nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    progress = _state.progress[item.nodeid]
    judgement = verdicts.judge(call.when, call.excinfo.value if call.excinfo else None)
    case = _case(item) if _state.waivers and judgement.verdict == verdicts.FAIL else None
    if case and (waiver := _state.waivers.waiver_of(case)):
        judgement, progress.waiver = replace(judgement, verdict=verdicts.WAIVED), waiver
    progress.judgement = progress.judgement.then(judgement)
    progress.duration_s += call.duration if call.when == "call" else 0
    if call.excinfo and isinstance(call.excinfo.value, GivenUp):
        report.when = "call"  # a fail to pytest too, though no fixture was set up for it
    if report.failed and _state.run:
        report.sections += [
            (f"end of {process.log_path}", process.tail(LOG_LINES))
            for process in _state.run.processes
            if process.used_s >= progress.began_s
        ]
    if judgement.verdict == verdicts.WAIVED:  # to pytest, what it knows as an expected failure
        report.outcome, report.waived = "skipped", True
        report.wasxfail = f"waived: {progress.waiver.reason} ({progress.waiver.issue})\n{judgement.detail}"
    if call.when == "teardown" and _state.record and _examines(item):
        _put_down(item, progress)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    return ("waived", "w", ("WAIVED", {"yellow": True})) if getattr(report, "waived", False) else None


def _put_down(item: pytest.Item, progress: Progress) -> None:
    """Add the verdict to the record and write that: what comes next may end the run."""
    requirement = selection.requirement_of(item)
    _state.verdicts["stage" in _params(item), progress.judgement.verdict] += 1
    entry = {
        "requirement": requirement.id if requirement else MEASURING,
        "level": requirement.level if requirement else "MUST",
        "text": requirement.text if requirement else "What is measured is verified before it is timed.",
        **_names(item),
        "verdict": progress.judgement.verdict,
        "detail": progress.judgement.detail,
        **({"cause": progress.judgement.cause} if progress.judgement.cause else {}),
        "duration_s": round(progress.duration_s, 3),
        "nodeid": item.nodeid,
        **({"tried": item.stash[TRIED]} if TRIED in item.stash else {}),
    }
    if progress.judgement.verdict == verdicts.WAIVED:
        entry |= {"waiver_issue": progress.waiver.issue, "waiver_reason": progress.waiver.reason}
    if _state.waivers and (case := _case(item)):
        _state.waivers.ended(case, progress.judgement.verdict)
    if requirement or progress.judgement.verdict in (verdicts.FAIL, verdicts.ERROR):
        _state.record.conformance.append(entry)
    _state.record.write()


# ---- the end


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that was to judge or measure and found nothing that applies is no success, nor one with stale waivers."""
    record = _state.record
    if _state.waivers and record and record.began:
        record.stale_waivers = [f"{waiver}: {wrong}" for waiver, wrong in _state.waivers.stale().items()]
    if session.exitstatus != pytest.ExitCode.OK:
        return
    if _nothing_judged():
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    elif record and record.stale_waivers:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    record = _state.record
    if record is None or not record.began:
        return
    document = record.write()
    record.write_page(document)
    terminalreporter.section("weight sync", sep="=")
    terminalreporter.write_line(_summary({**document, "stale_waivers": []}))  # they stand below, whatever becomes of it
    if _nothing_judged():
        counted = Counter(entry["verdict"] for entry in record.conformance)
        found = ", ".join(f"{counted[verdict]} {verdict}" for verdict in sorted(counted)) or "no case left"
        terminalreporter.write_line(f"\nNo stage was judged ({found}): this is no success.", red=True)
    if _state.waivers:
        terminalreporter.write_line(f"\n{_state.waivers}", red=bool(record.stale_waivers))
    for problem in [*record.stale_waivers, *record.problems]:
        terminalreporter.write_line(problem, red=True)
    terminalreporter.write_line(f"\nArtefacts in {record.directory}: {', '.join(record.artefacts())}")


def _nothing_judged() -> bool:
    """Whether no stage was judged; what needs none (names, say) counts where nothing else was asked for."""
    if _state.record is None or not _state.record.began:
        return False
    staged = any(on_stage for on_stage, _ in _state.verdicts)
    return not any(_state.verdicts[staged, verdict] for verdict in verdicts.JUDGED)


def _summary(document: dict[str, Any]) -> str:
    try:
        import reports

        return reports.render_text(document, width=SUMMARY_COLUMNS)
    except Exception as error:  # the artefacts and the verdicts stand all the same
        return f"no summary: {type(error).__name__}: {error}"
