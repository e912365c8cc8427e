"""From a machine's devices to the stages that it can hold.

GPUs go by UUID: nvidia-smi (NVML) says which there are, and nothing here initialises CUDA or imports torch.
"""

import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

NVIDIA_SMI_DEADLINE_S = 30
# How long a reference extension and the trainer wait for a peer that has stopped in the middle of a tensor, by kind of
# stage: GPUs move the largest in less than a second; gloo on cores that others use too may take several.
UPDATE_TIMEOUT_S = {"cpu": 15.0, "gpu": 6.0}
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")

# Lines of `nvidia-smi -L`: "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...)" and, below it, the slices it is cut into.
GPU_LINE = re.compile(r"GPU (?P<gpu>\d+): (?P<name>.*) \(UUID: (?P<uuid>GPU-[^)]+)\)")
SLICE_LINE = re.compile(r"\s+(?P<name>MIG .*\S)\s+Device\s+\d+: \(UUID: (?P<uuid>MIG-[^)]+)\)")


@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG slice of one; `gpu` is the GPU's place in nvidia-smi's list."""

    uuid: str
    name: str
    gpu: int

    @property
    def is_slice(self) -> bool:
        return self.uuid.startswith("MIG-")


@dataclass(frozen=True)
class Machine:
    """What this process may use. `note` says why there are no GPUs, or not all, where that is so."""

    devices: tuple[Device, ...]
    cpu_cores: int
    memory_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """Which devices the trainer's and the engines' ranks get.

    colocated: trainer and engine ranks share devices, rank by rank; on a CPU everything shares the host's memory.
    hosts_apart: NCCL is told that each process is on a host of its own; it would refuse two ranks on one GPU. Devices
    are UUIDs, none on a CPU; `engine_devices` has those of all engines in turn. `engine_visible`, `trainer_visible`:
    what they are called in CUDA_VISIBLE_DEVICES, where CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """

    name: str
    kind: str  # "cpu" | "gpu"
    tensor_parallel_size: int
    trainer_world_size: int
    colocated: bool
    engine_devices: tuple[str, ...] = ()
    trainer_devices: tuple[str, ...] = ()
    engine_visible: tuple[str, ...] = ()
    trainer_visible: tuple[str, ...] = ()
    pipeline_parallel_size: int = 1
    engines: int = 1
    hosts_apart: bool = False

    @property
    def engine_ranks(self) -> int:
        """Workers of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def gpus(self) -> int:
        """How many GPUs the stage takes."""
        if self.kind == "cpu":
            return 0
        if self.colocated:
            return max(self.engine_ranks, self.trainer_world_size)
        return self.engines * self.engine_ranks + self.trainer_world_size

    def nccl_environment(self, process: str) -> dict[str, str]:
        """What NCCL reads in the environment of a trainer's or an engine's process, by whatever name tells them apart.

        With a NCCL_HOSTID each, two ranks on one GPU pass for two hosts (NCCL 2.28 checks for duplicates within a host
        only) and talk over sockets.
        """
        return {"NCCL_HOSTID": process, "NCCL_NET": "Socket"} if self.hosts_apart else {}

    def devices_of_engine(self, engine: int = 0) -> tuple[str, ...]:
        """The UUIDs for one engine, by rank."""
        return self.engine_devices[engine * self.engine_ranks : (engine + 1) * self.engine_ranks]

    def visible_to_engine(self, engine: int = 0) -> str:
        """One engine's CUDA_VISIBLE_DEVICES."""
        return ",".join(self.engine_visible[engine * self.engine_ranks : (engine + 1) * self.engine_ranks])


# As they are without devices.
STAGES = (
    Stage("cpu-tp1", "cpu", tensor_parallel_size=1, trainer_world_size=1, colocated=True),
    Stage("cpu-tp2", "cpu", tensor_parallel_size=2, trainer_world_size=1, colocated=True),
    Stage("gpu-colocate-tp1", "gpu", tensor_parallel_size=1, trainer_world_size=1, colocated=True),
    Stage("gpu-shared", "gpu", 1, trainer_world_size=1, colocated=True, engines=2, hosts_apart=True),
    Stage("gpu-split", "gpu", tensor_parallel_size=1, trainer_world_size=1, colocated=False),
    Stage("gpu-colocate-tp2", "gpu", tensor_parallel_size=2, trainer_world_size=2, colocated=True),
    Stage("gpu-split-tp2", "gpu", tensor_parallel_size=2, trainer_world_size=2, colocated=False),
    Stage("gpu-fanout", "gpu", tensor_parallel_size=1, trainer_world_size=1, colocated=False, engines=2),
    Stage("gpu-split-pp2", "gpu", 1, trainer_world_size=1, colocated=False, pipeline_parallel_size=2),
)

# Those of one trainer and one engine of one rank: what has nothing to do with ranks is examined there.
GPU_OF_ONE_RANK = ("gpu-colocate-tp1", "gpu-shared", "gpu-split")


def available_stages(machine: Machine) -> list[Stage]:
    """The stages that the machine can hold, with their devices."""
    missing = unavailable(machine)
    return [_placed(stage, machine) for stage in STAGES if stage.name not in missing]


def unavailable(machine: Machine) -> dict[str, str]:
    """{stage name: why the machine cannot hold it}."""
    reasons = {stage.name: _lacking(stage, machine) for stage in STAGES}
    return {name: reason for name, reason in reasons.items() if reason}


def _lacking(stage: Stage, machine: Machine) -> str:
    if stage.kind == "cpu":
        needed, found = stage.tensor_parallel_size, machine.cpu_cores
        return "" if found >= needed else f"needs {needed} CPU cores, one for each rank; this process may use {found}"
    usable = _usable(stage, machine)
    if stage.hosts_apart and len(usable) > 1:
        return "stands in for gpu-split on a machine of one GPU; CUDA_VISIBLE_DEVICES=0 makes this one such"
    if len(usable) >= stage.gpus:
        return ""
    whole = "whole GPU" if _takes_whole(stage) else "GPU"
    note = f" ({machine.note})" if machine.note else ""
    return f"needs {stage.gpus} {whole}{'s' if stage.gpus > 1 else ''}, found {len(usable)}{note}"


def _usable(stage: Stage, machine: Machine) -> list[str]:
    return [device.uuid for device in machine.devices if not (device.is_slice and _takes_whole(stage))]


def _takes_whole(stage: Stage) -> bool:
    """MIG slices can't reach each other: they serve only stages of one device. NCCL is not for them."""
    return stage.gpus > 1 or stage.hosts_apart


def _placed(stage: Stage, machine: Machine) -> Stage:
    if stage.kind == "cpu":
        return stage
    chosen = tuple(_usable(stage, machine)[: stage.gpus])
    trainer = chosen[: stage.trainer_world_size]
    engines = chosen * stage.engines if stage.colocated else chosen[stage.trainer_world_size :]
    called = {device.uuid: _called(device) for device in machine.devices}
    return replace(
        stage,
        engine_devices=engines,
        trainer_devices=trainer,
        engine_visible=tuple(called[uuid] for uuid in engines),
        trainer_visible=tuple(called[uuid] for uuid in trainer),
    )


def _called(device: Device) -> str:
    """A GPU by its ordinal, which is all that vLLM understands before 0.24 (vllm#41848); a slice has none."""
    return device.uuid if device.is_slice else str(device.gpu)


def machine() -> Machine:
    """This machine, as far as this process may use it: CPU affinity, memory limit, CUDA_VISIBLE_DEVICES."""
    listed, note = _nvidia_devices()
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible_devices(value, listed)
    if len(devices) < len(listed):
        note = f"CUDA_VISIBLE_DEVICES={value!r} shows {len(devices)} of the {len(listed)} devices"
    return Machine(tuple(devices), len(os.sched_getaffinity(0)), _memory_bytes(), note)


def visible_devices(value: str | None, listed: list[Device]) -> list[Device]:
    """The devices that CUDA_VISIBLE_DEVICES leaves of the listed ones, in its order; all where it is None (unset).

    CUDA's rules: entries are ordinals, or UUIDs of GPUs, or UUIDs of slices, abbreviated as long as they are unique.
    The first entry that names nothing, or is of another sort, ends the list; a device named twice leaves none. Ordinals
    count in nvidia-smi's order, which is CUDA's where the GPUs are alike or CUDA_DEVICE_ORDER is PCI_BUS_ID. A GPU in
    slices stands for its first one.
    """
    if value is None:
        return list(listed)
    entries = [entry.strip() for entry in value.split(",")]
    found: list[Device] = []
    for entry in entries:
        device = _device_named(entry, listed)
        if device is None or _sort(entry) != _sort(entries[0]):
            break
        if device in found:
            return []
        found.append(device)
    return found


def _sort(entry: str) -> str:
    return entry[:4] if entry.startswith(("GPU-", "MIG-")) else "ordinal"


def _device_named(entry: str, listed: list[Device]) -> Device | None:
    if _sort(entry) != "ordinal":
        fitting = [device for device in listed if device.uuid.startswith(entry)]
        return fitting[0] if len(fitting) == 1 else None
    digits = re.match(r"\+?\d+", entry)  # as strtol reads it: "1x" is 1
    return next((device for device in listed if digits and device.gpu == int(digits[0])), None)


def _nvidia_devices() -> tuple[list[Device], str]:
    """What nvidia-smi lists, and why it lists nothing where that is so."""
    command = ["nvidia-smi", "-L"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_DEADLINE_S, check=False)
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi -L: {error}"
    devices = parse_listing(answer.stdout)
    if devices:
        return devices, ""
    said = " ".join((answer.stdout + answer.stderr).split()) or "nothing"
    return [], f"nvidia-smi -L ended with {answer.returncode} and said: {said[:200]}"


def parse_listing(text: str) -> list[Device]:
    """The devices in the output of `nvidia-smi -L`; a GPU that is cut into slices gives way to them."""
    devices: list[Device] = []
    for line in text.splitlines():
        if found := GPU_LINE.match(line):
            devices.append(Device(found["uuid"], found["name"], int(found["gpu"])))
        elif (found := SLICE_LINE.match(line)) and devices:
            gpu = devices[-1].gpu
            if not devices[-1].is_slice:
                devices.pop()
            devices.append(Device(found["uuid"], found["name"], gpu))
    return devices


def _memory_bytes() -> int:
    """The host's memory, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_MEMORY.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical
