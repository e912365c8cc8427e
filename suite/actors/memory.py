"""Peak memory above a mark: of the process on CPUs, of torch's allocator on CUDA devices."""

import os
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_PEAK = "5"  # written to /proc/self/clear_refs: the high-water mark starts anew (Linux, proc(5))

PIECE_BYTES = 2**30  # what a roofline moves at once: far larger than any cache, small enough to fit beside the weights


def pieces(nbytes: int) -> list[int]:
    """Sizes of the pieces in which a roofline moves `nbytes`."""
    whole, rest = divmod(nbytes, PIECE_BYTES)
    return [PIECE_BYTES] * whole + [rest] * bool(rest)


def mark(device: torch.device) -> int:
    """Start measuring; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    return _status_bytes("VmRSS")


def peak_above(marked: int, device: torch.device) -> int:
    """Bytes above `marked` at the highest since the mark."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - marked)
    return max(0, _status_bytes("VmHWM") - marked)


def resources(device: torch.device) -> dict[str, int]:
    """What this process holds: host memory, file descriptors, mappings, and torch's bytes on a CUDA device."""
    held = {
        "host_bytes": _status_bytes("VmRSS"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        held |= {"torch_bytes": torch.cuda.memory_allocated(device), "device_bytes": total - free}
    return held


def expands(device: torch.device) -> bool:
    """Whether torch has memory of a CUDA device in expandable segments."""
    return any(
        segment["is_expandable"] for segment in torch.cuda.memory_snapshot() if segment["device"] == device.index
    )


def _status_bytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
