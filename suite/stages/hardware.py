"""What the machine has: what nvidia-smi says, and what CUDA_VISIBLE_DEVICES leaves of it.

GPUs go by UUID: nvidia-smi (NVML) says which there are, and nothing here initialises CUDA or imports torch.
"""

import os
import re
import subprocess
from dataclasses import dataclass

NVIDIA_SMI_DEADLINE_S = 30

# Lines of `nvidia-smi -L`: "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...)" and, below it, the slices it is cut into.
GPU_LINE = re.compile(r"GPU (?P<gpu>\d+): (?P<name>.*) \(UUID: (?P<uuid>GPU-[^)]+)\)")
SLICE_PROFILE = re.compile(r"MIG \S*?\d+g\.(?P<gigabytes>\d+)gb")  # "MIG 1g.10gb", "MIG 1c.3g.40gb", "MIG 1g.10gb+me"
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
    note: str = ""


def machine() -> Machine:
    """This machine, as far as this process may use it: CPU affinity, CUDA_VISIBLE_DEVICES."""
    listed, note = _listed()
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible_devices(value, listed)
    if len(devices) < len(listed):
        note = f"CUDA_VISIBLE_DEVICES={value!r} shows {len(devices)} of the {len(listed)} devices"
    return Machine(tuple(devices), len(os.sched_getaffinity(0)), note)


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


def _listed() -> tuple[list[Device], str]:
    """What nvidia-smi lists, and why it lists nothing where that is so."""
    said, wrong = _nvidia_smi("-L")
    devices = parse_listing(said)
    return devices, "" if devices else wrong or f"nvidia-smi -L said: {' '.join(said.split())[:200] or 'nothing'}"


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


def query(fields: str) -> list[list[str]]:
    """A row for each GPU, a column for each of nvidia-smi's fields (`name,uuid`); no rows without a driver."""
    said, _ = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[field.strip() for field in line.split(",")] for line in said.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def gpu_memory_bytes() -> dict[str, int | None]:
    """The memory of every GPU and MIG slice, by UUID; None where nvidia-smi does not say. A slice's is in its name."""
    found = query("uuid,memory.total")
    whole = {uuid: int(mebibytes) << 20 if mebibytes.isdigit() else None for uuid, mebibytes in found}
    return whole | {device.uuid: _slice_bytes(device.name) for device in _listed()[0] if device.is_slice}


def _slice_bytes(name: str) -> int | None:
    profile = SLICE_PROFILE.match(name)
    return int(profile["gigabytes"]) * 10**9 if profile else None


def topology() -> str | None:
    """How the GPUs are connected, as nvidia-smi draws it, without its underlining."""
    said, _ = _nvidia_smi("topo", "-m")
    return re.sub(r"\x1b\[[0-9;]*m", "", said).strip() or None


def _nvidia_smi(*arguments: str) -> tuple[str, str]:
    """What nvidia-smi prints, and what went wrong; nothing is printed where it is missing, fails or takes too long."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_DEADLINE_S, check=False)
    except FileNotFoundError:
        return "", "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{' '.join(command)}: {error}"
    if done.returncode == 0:
        return done.stdout, ""
    said = " ".join((done.stdout + done.stderr).split()) or "nothing"
    return "", f"{' '.join(command)} ended with {done.returncode} and said: {said[:200]}"
