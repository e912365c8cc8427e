"""pytest's side of the suite: its hooks, and the run of processes. What they do stands in suite.session."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from suite.session import ending

ending.hold()  # the imports below take seconds

from suite.models import MODELS, own
from suite.processes.launcher import Launcher
from suite.processes.local import LocalLauncher
from suite.session import environment, judging, options, selection, verdicts
from suite.session.items import SELFTESTS, asked_for_nothing, case_of, examines, is_selftest, params_of, place_of
from suite.session.record import JUNIT, LOGS, Record
from suite.session.selection import MissingStage
from suite.session.state import Progress, State, keep, state_of
from suite.session.taken import expect_taken, left_by_words
from suite.stages import Stage
from suite.subjects import Subject

pytest_plugins = ("suite.fixtures",)
SUMMARY_COLUMNS = 100
CORES_TO_COMPILE = 8
ENGINES_IMPORT = ("vllm", "torch", "transformers", "triton", "sympy", "networkx", "scipy", "openai")


# ---- options and configuration


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    state = keep(State(config, examining=not _selftests_only(config)))
    for marker in options.MARKERS:
        config.addinivalue_line("markers", marker)
    config.option.benchmark_quiet = True  # its table knows nothing of bytes and rooflines: the summary does
    if state.examining and not config.option.collectonly:
        directory = Path(config.getoption("report") or config.rootpath / "reports" / "latest").resolve()
        state.record = Record(directory, config)
        config.option.xmlpath = config.option.xmlpath or str(directory / JUNIT)
    ending.listen()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that name nothing, and free the terminal reporter from pytest's capturing."""
    state = state_of(session.config)
    if state.examining:
        state.selection = selection.select(session.config)
        state.waivers = selection.ledger(session.config, state.selection)
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    with contextlib.suppress(AttributeError, OSError, ValueError):
        # Its file is private to pytest, and nothing else lets a line out at once while a test's output is captured.
        if terminal._tw._file is sys.stdout:
            descriptor = os.dup(sys.stdout.fileno())
            terminal._tw._file = os.fdopen(descriptor, "w", 1, encoding="utf-8", errors="backslashreplace")


def pytest_unconfigure(config: pytest.Config) -> None:
    if launcher := state_of(config).launcher:
        launcher.close()


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
    state = state_of(metafunc.config)
    if examines(metafunc.definition):
        selection.parametrize(metafunc, state.selection)
        if state.waivers:
            state.waivers.expect(selection.possible(metafunc, state.selection))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Drop what nothing was asked of, mark the rest, and bring those that share engines together."""
    idle = [item for item in items if asked_for_nothing(item)]
    collected = [*items]
    config.hook.pytest_deselected(items=idle)
    items[:] = [item for item in items if item not in idle]
    for item in items:
        if is_selftest(item):
            item.add_marker("selftest")
        if examines(item) and "stage" not in params_of(item):
            for kind in selection.KINDS:
                if environment.lacks_engine(kind) is None or environment.vllm() == (None, None):
                    item.add_marker(kind)
    order = {item.nodeid: index for index, item in enumerate(items)}
    left = left_by_words(session, config, items)
    yield
    if (chosen := state_of(config).selection) and not session.testsfailed:  # all files could be collected
        with _no_items_where_refused(items):
            expect_taken(config, chosen, collected, left)
    items.sort(key=lambda item: (*place_of(item), order[item.nodeid]))
    ending.end_if_told()


@contextlib.contextmanager
def _no_items_where_refused(items: list[pytest.Item]) -> Iterator[None]:
    """Drop all tests where the command line is refused: so no run begins, and the artefacts of the last one stay."""
    try:
        yield
    except pytest.UsageError:
        items.clear()
        raise


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        _due(items)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    state = state_of(session.config)
    _due(session.items)
    if state.waivers:
        state.waivers.whole &= not session.testsfailed  # what could not be collected is left out
    state.chosen = sum(map(examines, session.items))
    if state.record and state.chosen:
        state.record.begin()


def _due(items: Sequence[pytest.Item]) -> None:
    """Have the waivers know of what these tests judge."""
    for item in items:
        if waivers := state_of(item.config).waivers:
            waivers.due.update(filter(None, [case_of(item)]))


# ---- running


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave the host's name out: a report can be handed on."""
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Launcher]:
    """Starts engine and trainer processes, which end with the session."""
    state = state_of(pytestconfig)
    logs = state.record.directory / LOGS if state.record else tmp_path_factory.mktemp("run") / LOGS
    state.launcher = LocalLauncher(logs, state.answered)
    if state.selection and any(stage.kind == "gpu" for stage in state.selection.stages.values()):
        _compile_ahead(state)
    yield state.launcher
    state.launcher.close()


def _compile_ahead(state: State) -> None:
    """Compile what engines import. On few cores that would take longer than it saves."""
    if len(os.sched_getaffinity(0)) >= CORES_TO_COMPILE:
        with state.timeline("starting", "bytecode"):
            problem = state.launcher.compile_ahead(ENGINES_IMPORT)
        if problem:
            state.announce(f"the bytecode of {', '.join(ENGINES_IMPORT)} {problem}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End what cannot be judged before any fixture starts a process for it."""
    ending.end_if_told()
    state_of(item.config).progress[item.nodeid] = Progress()
    if not examines(item):
        return
    params, requirement = params_of(item), selection.requirement_of(item)
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
    spec = MODELS.get(params.get("model"))
    if requirement and spec and spec.layout is not None and requirement.id in own.LEFT_OUT:
        verdicts.not_applicable(f"{requirement.id} {own.LEFT_OUT[requirement.id]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    judged = examines(item)
    with state_of(item.config).timeline("judging", item.name) if judged else contextlib.nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    judging.take(item, call, report)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    return ("waived", "w", ("WAIVED", {"yellow": True})) if getattr(report, "waived", False) else None


# ---- the end


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that was to judge or measure and found nothing that applies is no success, nor one with stale waivers."""
    state = state_of(session.config)
    record = state.record
    if state.waivers and record and record.began:
        record.stale_waivers = [f"{waiver}: {wrong}" for waiver, wrong in state.waivers.stale().items()]
    if session.exitstatus != pytest.ExitCode.OK:
        return
    if _nothing_judged(state):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    elif record and record.stale_waivers:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = state_of(config)
    record = state.record
    if record is None or not record.began:
        return
    document = record.write()
    record.write_page(document)
    terminalreporter.section("weight sync", sep="=")
    terminalreporter.write_line(_summary({**document, "stale_waivers": []}))  # they stand below, whatever becomes of it
    if (left := state.chosen - sum(state.verdicts.values())) > 0:
        said = f"The run ended early, with no verdict on {left} of {state.chosen} cases."
        terminalreporter.write_line(f"\n{said}", red=True)
    if _nothing_judged(state):
        counted = Counter(entry["verdict"] for entry in record.conformance)
        found = ", ".join(f"{counted[verdict]} {verdict}" for verdict in sorted(counted)) or "no case left"
        terminalreporter.write_line(f"\nNo stage was judged ({found}): this is no success.", red=True)
    if state.waivers:
        terminalreporter.write_line(f"\n{state.waivers}", red=bool(record.stale_waivers))
    for problem in [*record.stale_waivers, *record.problems]:
        terminalreporter.write_line(problem, red=True)
    terminalreporter.write_line(f"\nArtefacts in {record.directory}: {', '.join(record.artefacts())}")


def _nothing_judged(state: State) -> bool:
    """Whether no stage was judged; what needs none (names, say) counts where nothing else was asked for."""
    if state.record is None or not state.record.began:
        return False
    staged = any(on_stage for on_stage, _ in state.verdicts)
    return not any(state.verdicts[staged, verdict] for verdict in verdicts.JUDGED)


def _summary(document: dict[str, Any]) -> str:
    try:
        import reports

        return reports.render_text(document, width=SUMMARY_COLUMNS)
    except Exception as error:  # the artefacts and the verdicts stand all the same
        return f"no summary: {type(error).__name__}: {error}"
