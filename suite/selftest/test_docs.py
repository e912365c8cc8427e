"""What the README and the pages of docs/ say works as written, and the written tables are those of the commands."""

import re
import shlex
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from extensions.manifest import manifest_of
from reports import results
from reports.__main__ import main as reports
from reports.results import results_markdown
from suite import ROOT
from suite.conformance import test_update
from suite.conformance.__main__ import page as requirements
from suite.selftest import fakes, reports_data
from suite.selftest.mutants import registry, states
from suite.subjects import load, subject_from

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "extensions" / "README.md", *(ROOT / "docs").glob("*.md")])
LONGEST_README, LONGEST_EXAMPLE = 200, 40
GENERATED = {"results": "python -m reports results", "requirements": "python -m suite.conformance"}
PYTEST = re.compile(r"^ {4}pytest (.*?)(?: {2,}#.*)?$", re.MULTILINE)
TOX = re.compile(r"\btox run -e ([\w-]+)")
REPORTS = re.compile(r"^ {4}python -m reports (.*?)(?: {2,}#.*)?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
OURS = re.compile(r"`((?:suite|extensions|reports|docs)/[\w./-]*)")


def example(name: str) -> str:
    """The code of the README below the marker of this name."""
    (code,) = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    return code


def test_the_readme_is_short():
    assert README.count("\n") <= LONGEST_README
    assert example("extension").count("\n") < LONGEST_EXAMPLE


# ---- the example of an extension


@pytest.fixture
def file_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, saved under the name that the README gives it."""
    (tmp_path / "file_sync.py").write_text(example("extension"))
    monkeypatch.syspath_prepend(str(tmp_path))
    subject = subject_from("file_sync:FileExtension")
    yield sys.modules[subject.load().__module__]
    del sys.modules["file_sync"]


def test_the_example_is_a_subject(file_sync: ModuleType):
    subject = subject_from("file_sync:FileExtension")
    assert (subject.name, subject.load()) == ("FileExtension", file_sync.FileExtension)
    assert load(subject.sender) is file_sync.FileSender


def test_the_example_moves_weights(file_sync: ModuleType, monkeypatch: pytest.MonkeyPatch):
    members = {name: value for name, value in vars(fakes.Worker).items() if not name.startswith("__")}
    members["__init__"] = fakes.Worker.__init__
    worker = fakes.fitted(monkeypatch, type("Worker", (file_sync.FileExtension,), members))
    sender = file_sync.FileSender(fakes.CPU)
    for value in (3, 5):
        sent = fakes.tensors(value)
        worker.begin_update(manifest_of(sent.items()))
        worker.update_weights_from_ipc_handles(sender.handles(sent.items()))
        assert worker.end_update() == len(sent)
        assert all(torch.equal(worker.model.held[name], tensor) for name, tensor in sent.items())
    sender.release()
    assert not sender._path.exists()
    sender.release()


# ---- what is written by commands


@pytest.mark.parametrize(("name", "written"), [("results", results_markdown), ("requirements", requirements)])
def test_a_generated_page_is_what_its_command_prints(name: str, written):
    path = ROOT / "docs" / f"{name}.md"
    assert path.read_text() == written(), f"docs/{name}.md is stale; try next: {GENERATED[name]} > docs/{name}.md"


def test_the_readmes_table_of_subjects_is_what_its_command_prints(capsys: pytest.CaptureFixture):
    ((folders, table),) = re.findall(r"<!-- subjects: (.*?) -->\n((?:\|.*\n)+)", README)
    files = [file for folder in folders.split() for file in sorted((results.BASELINES / folder).glob("*.json"))]
    assert reports(["subjects", *map(str, files)]) == 0
    assert table == capsys.readouterr().out, f"try next: python -m reports subjects with the runs of {folders}"


def test_results_prints_the_page(capsys: pytest.CaptureFixture):
    assert reports(["results"]) == 0
    assert capsys.readouterr().out == results_markdown()


def test_results_without_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert reports(["results", "--baselines", str(tmp_path)]) == 2
    assert "expected a folder of run.json files for every machine, found none" in capsys.readouterr().err
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "broken.json").write_text("{")
    assert reports(["results", "--baselines", str(tmp_path)]) == 2
    assert f"{tmp_path / 'machine' / 'broken.json'}: line 1 column 2" in capsys.readouterr().err


def test_other_subjects_have_a_table_of_their_own_for_each_run(tmp_path: Path):
    (tmp_path / "machine").mkdir()
    document = reports_data.run()
    document["conformance"] = [
        reports_data.outcome("update.exact", "broadcast", "gpu-split", "qwen3-8b", "pass", ""),
        reports_data.outcome("update.exact", "verl", "gpu-split", "qwen3-8b", "fail", "stale"),
        reports_data.outcome("update.order", "verl", "gpu-split", "qwen3-8b", "unsupported", "no order"),
    ]
    reports_data.write(document, tmp_path / "machine" / "run.json")
    page = results_markdown(tmp_path)
    assert "| requirement, 0.33.0 | broadcast | verl |" in page
    assert "| update.exact | ✓ pass | ✗ fail |" in page
    assert "update.order" not in page, "expected nothing of what no subject was judged by"


@pytest.mark.parametrize("content", ["[", "{}", '{"counts": {"pass": "many"}}'])
def test_broken_counts_of_repeats_are_refused_with_their_place(tmp_path: Path, content: str, capsys):
    (tmp_path / "cpu").symlink_to(ROOT / "reports" / "baselines" / "cpu")
    (tmp_path / "repeated").mkdir()
    (tmp_path / "repeated" / "broken.json").write_text(content)
    assert reports(["results", "--baselines", str(tmp_path)]) == 2
    assert "repeated/broken.json: " in capsys.readouterr().err


# ---- links, names and commands


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_names_lead_somewhere(page: Path):
    text = page.read_text()
    broken = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    broken += [name for name in OURS.findall(text) if not exists(name)]
    assert not broken, f"{page.relative_to(ROOT)}: expected files of this repository, found {broken}"


def exists(name: str) -> bool:
    """Whether there is such a file or folder; `reports/latest` and what is in it are written by a run."""
    return name.startswith("reports/latest") or any(ROOT.glob(f"{name.rstrip('/')}*" if name[-1] == "_" else name))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(page: Path, pytestconfig: pytest.Config):
    text = page.read_text()
    environments = tox_environments()
    assert set(TOX.findall(text)) <= environments
    for command in PYTEST.findall(text):
        options = [word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")]
        unknown = [option for option in options if not hasattr(pytestconfig.option, known_as(option))]
        assert not unknown, f"{page.relative_to(ROOT)}: expected options of pytest, found {unknown} in {command!r}"


def known_as(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def tox_environments() -> set[str]:
    """The names of tox.ini, with every factor in braces written out."""
    found = set()
    for name in re.findall(r"^\[testenv:(.+)\]$", (ROOT / "tox.ini").read_text(), re.MULTILINE):
        before, brace, factors = name.partition("{")
        found |= {before + factor for factor in factors.rstrip("}").split(",")} if brace else {name}
    return found


@pytest.mark.parametrize("command", REPORTS.findall(README))
def test_a_command_of_reports_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    assert reports(shlex.split(command)) in (0, 1)
    assert capsys.readouterr().out.startswith(("Worse", "Nothing worse"))


# ---- the examples of a requirement and its mutant


@pytest.fixture
def added() -> dict[str, object]:
    """What the code of docs/adding.md makes, each block in the file for which the page writes it."""
    blocks = re.findall(r"^ {3}```python\n(.*?)^ {3}```", (ROOT / "docs" / "adding.md").read_text(), re.DOTALL | re.M)
    made: dict[str, object] = {}
    for file, code in zip((test_update, states), blocks, strict=True):
        exec(textwrap.dedent(code), names := {**vars(file)})
        made |= {name: value for name, value in names.items() if name not in vars(file)}
    yield made
    for registered in (registry.MUTANTS, registry.CLASSES):
        del registered["ZeroesWhatComesAgain"]


def test_the_requirement_that_is_added_is_one_and_its_mutant_fails_it(added: dict[str, object]):
    clause, mutant = added["test_again"].requirement, registry.MUTANTS["ZeroesWhatComesAgain"]
    assert (clause.id, mutant.requirement, mutant.cpu) == ("update.again", "update.again", "cpu-tp1")
    broken, ones, twos = object.__new__(added["ZeroesWhatComesAgain"]), torch.ones(2), torch.full((2,), 2.0)
    loaded = []
    for tensor in (ones, twos, twos):
        broken._mutant_load(lambda name, tensor: loaded.append(tensor.tolist()), "weight", tensor)
    assert loaded == [[1, 1], [2, 2], [0, 0]]
