"""Which device is which across processes.

An ordinal means something only inside the process that has it: another process may see other GPUs, or the same ones in
another order. So devices go by the UUID that the driver gives them, in NVML's spelling (`GPU-...`, `MIG-...`).
"""

import os
from pathlib import Path

import torch

CPU_DEVICE_ID = "WEIGHT_SYNC_CPU_DEVICE_ID"  # another id for host memory, so that one machine can stand for several


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that is queued. An update is acknowledged when the copies are made."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_id(device: torch.device) -> str:
    """The id of a device, the same in every process of the machine.

    A CUDA device has `GPU-<uuid>`, as nvidia-smi prints it; torch leaves the prefix out. A slice that
    CUDA_VISIBLE_DEVICES names has `MIG-<uuid>`. Some drivers give a slice the UUID of its GPU, which all slices share.
    There the id is the entry in CUDA_VISIBLE_DEVICES. The CPU has `CPU-<boot id>`, or the value of
    WEIGHT_SYNC_CPU_DEVICE_ID.
    """
    if device.type == "cpu":
        return os.environ.get(CPU_DEVICE_ID) or "CPU-" + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    entry = visible[index].strip() if index < len(visible) else ""
    if not entry.startswith("MIG-"):
        return f"GPU-{uuid}"
    return f"MIG-{uuid}" if f"MIG-{uuid}".startswith(entry) else entry
