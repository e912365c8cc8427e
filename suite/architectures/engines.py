"""Judge architectures on real engines: one run of the suite, with a checkpoint of each as its `--model DIR`."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import ROOT
from suite.architectures import checkpoints
from suite.architectures.pictures.sitecustomize import let_torchvision_be_imported
from suite.models.own import UnknownModel

STAGES = {"cpu-tp1": "TP 1", "cpu-tp2": "TP 2"}
SUBJECTS = ("broadcast", "colocate")
TESTS = ("test_exact", "test_behaviour")
# Architectures that differ in kind, and in what.
KINDS = {
    "Llama": "dense",
    "Qwen2-MoE": "experts, and one that all tokens share",
    "DeepSeek V2": "latent attention, with experts",
    "GPT-OSS": "attention sinks, experts with biases in one tensor",
    "Gemma 3": "tied embeddings, norms to which 1 is added",
    "Phi-3": "one tensor for q, k and v in the checkpoint, and one for gate and up",
    "GPT-2": "transposed matrices, learnt positions",
    "GPT-NeoX": "q, k and v of every head in turn",
    "LFM2": "convolutions between attention layers",
    "Mamba2": "state spaces, without attention",
    "Qwen3-VL": "a vision tower, whose weights are judged, beside a language model, which is asked",
}
EXACT, REFUSED, WRONG, NOT_RUN = "exact", "refused", "wrong", "not run"
OUTCOMES = (EXACT, REFUSED, WRONG, NOT_RUN)
BAD = (WRONG, NOT_RUN)
REFUSAL = "ManifestError"  # what begin_update raises for an update that it does not take
DEADLINE_S = 300  # for every architecture of a run
CHARACTERS, LINES = 300, 3  # of a reason
PICTURES = Path(__file__).parent / "pictures"

Row = dict[str, tuple[str, str]]  # (outcome, why) by stage


def judge(names: Sequence[str], stages: Sequence[str], logs: Path) -> dict[str, Row]:
    """Judge architectures on engines of these stages; what the run leaves is kept in `logs`.

    A run that does not end in time is killed, and what it has judged counts.
    """
    let_torchvision_be_imported()
    (logs / "run.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="ws-architectures-") as directory:
        found: dict[str, Row] = {}
        directories = {}
        for name in names:
            try:
                directories[name] = checkpoints.write(name, checkpoints.SEEDS[0], Path(directory) / slug(name))
            except UnknownModel as error:
                found[name] = dict.fromkeys(stages, (NOT_RUN, str(error)))
        ended = _run(command(list(directories.values()), stages, logs), DEADLINE_S * len(directories))
    document = _document(logs / "run.json")
    for name in directories:
        found[name] = {stage: outcome_of(document.get("conformance", []), slug(name), stage, ended) for stage in stages}
    return {name: found[name] for name in names}


def slug(name: str) -> str:
    """The name of an architecture's directory, which is that of its model in run.json."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def command(directories: Sequence[Path], stages: Sequence[str], logs: Path) -> list[str]:
    """The run of the suite that judges these models."""
    words = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "suite.plugin", "-m", "cpu"]
    words += ["-p", "no:cacheprovider", "--tb=no", f"--report={logs}"]
    words += [f"--stage={stage}" for stage in stages] + [f"--subject={subject}" for subject in SUBJECTS]
    words += [f"--model={directory}" for directory in directories]
    return [*words, *(f"{ROOT / 'suite' / 'conformance' / 'test_update.py'}::{test}" for test in TESTS)]


def _run(words: list[str], deadline_s: float) -> str:
    """Run it, with its output on ours. Returns how it ended, for cases of which the run says nothing."""
    paths = os.pathsep.join(filter(None, [str(PICTURES), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired:
        return f"the run did not end within {deadline_s:.0f} s"
    return f"the run ended with exit status {done.returncode} without judging it"


def _document(path: Path) -> dict[str, Any]:
    """The run's own record, empty where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def outcome_of(entries: Sequence[Mapping[str, Any]], model: str, stage: str, ended: str) -> tuple[str, str]:
    """(outcome, why) of a model on a stage, from the run's verdicts: exact only if every case of it passed."""
    judged = [entry for entry in entries if (entry["model"], entry["stage"]) == (model, stage)]
    bad = [entry for entry in judged if entry["verdict"] != "pass"]
    if bad:
        told = [_outcome(entry) for entry in bad]
        outcome = min(told, key=[WRONG, REFUSED, NOT_RUN].index)
        entry = bad[told.index(outcome)]
        return outcome, f"{entry['requirement']}, {entry['subject']}: {_reason(entry)}"
    if len(judged) < len(SUBJECTS) * len(TESTS):
        return NOT_RUN, ended
    return EXACT, ""


def _outcome(entry: Mapping[str, Any]) -> str:
    if entry["verdict"] != "fail":
        return NOT_RUN
    return REFUSED if REFUSAL in entry.get("cause", "") else WRONG


def _reason(entry: Mapping[str, Any]) -> str:
    lines = [line.strip() for line in (entry.get("cause") or entry["detail"]).splitlines() if line.strip()]
    return " ".join(lines[:LINES])[:CHARACTERS]
