"""Where a run was measured: one flat table of facts, what differs between two, and whether it is the same hardware."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reports.node import Node
from reports.pace import Paces, paces


@dataclass(frozen=True)
class Environment:
    """`facts` in reading order; `hardware` is empty where the file does not say. `paces`: the host's, by stage."""

    facts: tuple[tuple[str, str], ...]
    hardware: str
    vllm: str
    paces: Paces = ()

    @property
    def line(self) -> str:
        facts = dict(self.facts)
        parts = [f"{name} {facts[name]}" for name in ("vLLM", "torch", "NCCL") if name in facts]
        return ", ".join([*parts, *([self.hardware] if self.hardware else [])]) or "environment not recorded"


def differences(a: Environment, b: Environment) -> list[tuple[str, str, str]]:
    """(fact, value in A, value in B) of all that differ; a fact that one side lacks reads as a dash."""
    in_a, in_b = dict(a.facts), dict(b.facts)
    names = [*in_a, *(name for name in in_b if name not in in_a)]
    return [(n, in_a.get(n, "-"), in_b.get(n, "-")) for n in names if in_a.get(n) != in_b.get(n)]


def environment(root: Node) -> Environment:
    """Read our own section, or what pytest-benchmark's machine_info says of the machine."""
    return _ours(root["environment"]) if "environment" in root else _plain(root)


def _ours(node: Node) -> Environment:
    vllm = node["vllm"]["version"].optional_text() if "vllm" in node else None
    cpu = node["cpu"] if "cpu" in node else Node({}, node.file)
    devices = list(node["devices"]) if "devices" in node else []
    named = Counter(device["name"].text() for device in devices if device["kind"].optional_text() != "cpu")
    gpus = ", ".join(f"{count} x {name}" for name, count in named.items())
    cores = cpu["cores"].optional_number()
    processor = " ".join(filter(None, [cpu["model"].optional_text(), f"({cores:.0f} cores)" if cores else ""]))
    memory = node["memory_bytes"].optional_number()
    facts = [
        ("vLLM", vllm),
        ("distribution", node["vllm"]["distribution"].optional_text() if "vllm" in node else None),
        ("torch", node["torch"].optional_text()),
        ("NCCL", node["nccl"].optional_text()),
        ("driver", node["driver"].optional_text()),
        ("GPUs", gpus),
        ("GPU memory", ", ".join(_gib(device["memory_bytes"].optional_number()) for device in devices)),
        ("GPU units", ", ".join(device["uuid"].optional_text() or "" for device in devices)),
        ("topology", node["topology"].optional_text()),
        ("CPU", processor),
        ("memory", _gib(memory)),
        ("platform", node["platform"].optional_text()),
        ("Python", node["python"].optional_text()),
    ]
    for name in sorted(node["packages"].of(dict, "an object")) if "packages" in node else ():
        facts.append((name, node["packages"][name].optional_text()))
    for name in sorted(node["cold_answers"].of(dict, "an object")) if "cold_answers" in node else ():
        facts.append((f"cold engines of {name}", node["cold_answers"][name].optional_text()))
    suite = node["suite"] if "suite" in node else Node({}, node.file)
    facts.append(("suite", " ".join(filter(None, [suite["version"].optional_text(), suite["commit"].optional_text()]))))
    # A GPU run is about the GPUs: the processor beside them is a fact to show, not another machine.
    known = tuple((name, value) for name, value in facts if value)
    return Environment(known, gpus or processor, vllm or "", paces(node))


def _plain(root: Node) -> Environment:
    machine = root["machine_info"] if "machine_info" in root else Node({}, root.file)
    machine.of(dict, "an object")
    cpu = machine["cpu"].value if isinstance(machine["cpu"].value, dict) else {}
    processor = str(cpu.get("brand_raw") or cpu.get("brand") or machine["processor"].value or "")
    cores = f" ({cpu['count']} cores)" if processor and cpu.get("count") else ""
    commit = root["commit_info"]["id"].optional_text() if "commit_info" in root else None
    facts = [
        ("CPU", processor + cores),
        ("platform", " ".join(str(machine[name].value or "") for name in ("system", "release")).strip()),
        ("Python", machine["python_version"].optional_text()),
        ("commit", commit if commit != "unknown" else None),
    ]
    return Environment(tuple((name, value) for name, value in facts if value), processor + cores, "")


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.0f} GiB" if size else ""
