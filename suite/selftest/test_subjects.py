"""A user's class becomes a subject by the methods that it has, or is refused with what is missing."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from suite import ROOT
from suite.stages import STAGES
from suite.subjects import SUBJECTS, from_plain, known_subjects, load, registry, subject_from
from suite.subjects.broadcast import Broadcast
from suite.subjects.handles import Handles

CPU = ("cpu-tp1", "cpu-tp2", "cpu-pp2", "cpu-fanout", "cpu-serve", "cpu-dp2")
APART = (
    "gpu-split", "gpu-shared", "gpu-fanout", "gpu-fanout3", "gpu-split-tp2", "gpu-split-pp2", "gpu-split-pp2-tp2",
)  # fmt: skip
COLOCATED = (
    "gpu-colocate-tp1", "gpu-serve", "gpu-colocate-tp2", "gpu-colocate-pp2", "gpu-colocate-tp4", "gpu-colocate-pp2-tp2",
)  # fmt: skip
MODULE = """
import functools

class Broadcasting:
    def init_weight_update_group(self): ...
    def update_weight(self): ...
    def check_weights_changed(self): ...

class Handing:
    def report_device_id(self): ...
    def update_weights_from_ipc_handles(self): ...
    def check_weights_changed(self): ...

class Inheriting(Broadcasting):
    pass

class Sending(Broadcasting):
    weight_sync_sender = "ws_theirs:Sender"

class Sender:
    pass

class Mistyped(Broadcasting):
    weight_sync_sender = "ws_theirs:Sendr"

class Both(Broadcasting, Handing):
    pass

class Partial:
    def update_weight(self): ...
    def check_weights_changed(self): ...

class Attributes:
    init_weight_update_group = update_weight = check_weights_changed = "text"

class Strict:
    def __init__(self):
        raise AssertionError("vLLM never makes an object of it, and neither may the suite")
    def init_weight_update_group(self): ...
    def update_weight(self): ...
    def check_weights_changed(self): ...

def function(): ...
instance = Broadcasting()
made = functools.partial(Broadcasting)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules of a user's own: theirs, and some that can't be imported."""
    for name, text in {
        "theirs": MODULE,
        "syntax": "class Broken(:",
        "raising": "raise RuntimeError('no GPU here')",
        "lacking": "import no_such_module_of_theirs",
        "asserting": "assert False",
    }.items():
        (tmp_path / f"ws_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("ws_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", [name for name, known in known_subjects().items() if type(known) in registry.KINDS])
def test_a_known_subject_is_what_its_class_would_become(name: str):
    subject = known_subjects()[name]
    found = dataclasses.replace(subject_from(subject.extension), name=name)
    assert (found, subject.name) == (subject, name)
    assert found.lacks.keys() == subject.lacks.keys()
    assert all(map(subject.can, subject.methods))
    assert from_plain(subject.plain()).plain() == subject.plain()


def test_the_references_lack_nothing_that_their_way_of_moving_has():
    assert {name: [*subject.lacks] for name, subject in SUBJECTS.items()} == {
        "broadcast": ["devices.wrong_handle", "devices.missing_handle"], "colocate": []
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("broadcast", [*CPU, *APART]),
        ("example-broadcast", [*APART]),
        ("colocate", [*CPU, *COLOCATED]),
        ("example-colocate", [*COLOCATED]),
    ],
)
def test_the_stages_on_which_a_subject_makes_sense(name: str, stages: list[str]):
    subject = known_subjects()[name]
    reasons = {stage.name: subject.unfit(stage) for stage in STAGES}
    assert {stage for stage, reason in reasons.items() if not reason} == set(stages)
    assert all(reason.startswith(f"{stage}: ") for stage, reason in reasons.items() if reason)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Broadcasting", Broadcast), ("Handing", Handles), ("Inheriting", Broadcast), ("Both", Broadcast),
        ("Strict", Broadcast),
    ],
)  # fmt: skip
def test_a_users_class_becomes_a_subject(modules: Path, name: str, kind: type):
    subject = subject_from(f"ws_theirs:{name}")
    assert (subject.name, subject.extension, type(subject)) == (name, f"ws_theirs:{name}", kind)
    assert subject.load().__name__ == name


@pytest.mark.parametrize("name", ["Partial", "Attributes"])
def test_a_class_without_the_methods_is_told_which_there_would_be(modules: Path, name: str):
    with pytest.raises(ValueError, match=f"ws_theirs:{name} has the methods of no known kind of subject") as caught:
        subject_from(f"ws_theirs:{name}")
    for kind in registry.KINDS:
        assert ", ".join(kind.methods) in str(caught.value)


@pytest.mark.parametrize("name", ["function", "instance", "made", "functools"])
def test_what_is_no_class_is_refused(modules: Path, name: str):
    with pytest.raises(ValueError, match=f"ws_theirs:{name} is a [a-zA-Z]+, not a class"):
        subject_from(f"ws_theirs:{name}")


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        ("", "Empty module name"),
        (":", "Empty module name"),
        (":Broadcasting", "Empty module name"),
        ("ws_theirs", "no attribute ''"),
        ("ws_theirs:", "no attribute ''"),
        ("ws_theirs.Broadcasting", "No module named 'ws_theirs.Broadcasting'"),
        ("ws_theirs:Missing", "no attribute 'Missing'"),
        ("ws_theirs:Broadcasting:more", "no attribute 'Broadcasting:more'"),
        ("ws_missing:Class", "No module named 'ws_missing'"),
        ("ws_theirs.sub:Class", "is not a package"),
        (".ws_theirs:Class", "relative import"),
        ("..:Class", "relative import"),
        ("ws_theirs.py:Class", "is not a package"),
        ("/tmp/ws_theirs:Class", "No module named"),
        ("ws theirs:Class", "No module named"),
        ("ws_syntax:Class", "SyntaxError"),
        ("ws_raising:Class", "RuntimeError: no GPU here"),
        ("ws_lacking:Class", "No module named 'no_such_module_of_theirs'"),
        ("ws_asserting:Class", "AssertionError"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(modules: Path, extension: str, said: str):
    with pytest.raises(ValueError, match=r"^expected an extension as pkg\.module:Class, found ") as caught:
        load(extension)
    assert said in str(caught.value)
    assert repr(extension) in str(caught.value)


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        ("ws_raising:Class", "expected an extension as pkg.module:Class, found 'ws_raising:Class'"),
        (".ws_theirs:Class", "expected an extension as pkg.module:Class"),
        ("ws_theirs:Partial", "has the methods of no known kind of subject"),
    ],
)
def test_a_wrong_extension_is_an_error_of_usage_not_a_traceback(modules: Path, extension: str, said: str):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    ended = subprocess.run(
        [*command, f"--extension={extension}"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(modules)}, check=False,
    )  # fmt: skip
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--extension {extension}: " in ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_module_beside_the_user_is_found(modules: Path):
    """As with `python -m pytest`, also where pytest is started by its own name."""
    script = Path(sys.executable).with_name("pytest")
    command = [str(script) if script.exists() else "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    ended = subprocess.run(
        [*command, *options, "--extension=ws_theirs:Broadcasting", str(ROOT / "suite" / "conformance")],
        cwd=modules, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), ended.stdout + ended.stderr


def test_a_sender_of_its_own_is_taken_from_the_class(modules: Path):
    assert subject_from("ws_theirs:Sending").sender == "ws_theirs:Sender"
    assert subject_from("ws_theirs:Broadcasting").sender == ""


def test_a_sender_that_cannot_be_imported_is_told_from_the_extension(modules: Path):
    said = "expected the sender that Mistyped.weight_sync_sender names as pkg.module:Class, found 'ws_theirs:Sendr': "
    with pytest.raises(ValueError, match=f"^{re.escape(said)}.*has no attribute 'Sendr'"):
        subject_from("ws_theirs:Mistyped")


def test_nobody_outside_asks_a_subject_for_a_transport():
    suite = ROOT / "suite"
    inside = (suite / "subjects", suite / "selftest")
    files = [path for path in suite.rglob("*.py") if not any(folder in path.parents for folder in inside)]
    assert len(files) > 40
    assert not [path for path in files if re.search(r"\btransport\b", path.read_text())]


@pytest.mark.parametrize("has", [(), ("begin_update",), ("begin_update", "end_update", "abort_update", "update_state")])
def test_an_engine_calls_what_a_class_has_around_an_update(modules: Path, monkeypatch: pytest.MonkeyPatch, has: tuple):
    called: list[str] = []
    subject = subject_from("ws_theirs:Broadcasting")
    for method in has:
        monkeypatch.setattr(subject.load(), method, lambda self: None, raising=False)
    half = subject.engine_half(SimpleNamespace(devices=[], rpc=lambda method, *args: called.append(method)))
    half.begin([])
    half.end()
    half.abort()
    half.state()
    assert called == [*has]


def test_a_subject_without_labels_is_told_to_say_so(modules: Path):
    half = subject_from("ws_theirs:Broadcasting").trainer_half(SimpleNamespace(device=None))
    with pytest.raises(NotImplementedError, match=r"override mislabelled\(\), or say .*'devices.wrong_handle': reason"):
        half.mislabelled({}, "GPU-0")
    with pytest.raises(NotImplementedError, match=r"override withheld\(\), or say .*'devices.missing_handle': reason"):
        half.withheld({}, "model.norm.weight")


# ---- what installed packages bring

BRINGS = """
from suite.subjects.broadcast import Broadcast

SUBJECT = Broadcast("theirs", "ws_theirs:Broadcasting", sender="ws_theirs:Sender")
TAKEN = Broadcast("broadcast", "ws_theirs:Broadcasting")
NONE = "text"
"""


@pytest.fixture
def install(modules: Path) -> Iterator[Callable[[str], Path]]:
    """Install a package with one entry point."""

    def install(entry: str) -> Path:
        (modules / "ws_brings.py").write_text(BRINGS)
        info = modules / "ws_theirs-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ws-theirs\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ntheirs = {entry}\n")
        registry._installed.cache_clear()
        return modules

    yield install
    registry._installed.cache_clear()


def test_an_installed_package_brings_a_subject(install: Callable[[str], Path]):
    install("ws_brings:SUBJECT")
    assert [*known_subjects()] == [*SUBJECTS, *registry.NAMED, "theirs"]
    assert known_subjects()["theirs"].load().__name__ == "Broadcasting"
    assert "theirs" not in SUBJECTS, "expected it to be examined where --subject names it"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("ws_raising:SUBJECT", "cannot be loaded: RuntimeError: no GPU here"),
        ("ws_brings:MISSING", "cannot be loaded: AttributeError"),
        ("ws_brings:TAKEN", "there is a subject broadcast already"),
        ("ws_brings:NONE", "expected a Subject, found a str"),
    ],
)
def test_an_entry_point_that_brings_no_subject_is_refused_with_its_name(
    install: Callable[[str], Path], entry: str, said: str
):
    install(entry)
    with pytest.raises(ValueError, match=f"entry point theirs = {entry} of group weight_sync_subjects") as caught:
        known_subjects()
    assert said in str(caught.value)


def test_an_entry_point_that_fails_is_an_error_of_usage_not_a_traceback(install: Callable[[str], Path]):
    path = install("ws_raising:SUBJECT")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(path)},
        check=False,
    )  # fmt: skip
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "entry point theirs = ws_raising:SUBJECT" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
