"""Files in shared memory that hold the tensors of an update."""

import os
import re
import secrets
from pathlib import Path

import torch

from extensions.tensors import dtype_name, flat_bytes

SHARED_MEMORY = Path("/dev/shm")
SEGMENT_NAME = re.compile(r"weight-sync-[A-Za-z0-9-]{1,80}")
RUN_ID = "WEIGHT_SYNC_RUN_ID"
ALIGNMENT_BYTES = 64


class SharedSegment:
    """One file in shared memory that holds the tensors of an update."""

    def __init__(self, nbytes: int) -> None:
        # The run's id comes first, so that whoever ends a run can find what a killed trainer left.
        run = re.sub(r"[^A-Za-z0-9]", "", os.environ.get(RUN_ID, ""))[:40] or "x"
        self.name = f"weight-sync-{run}-{os.getpid()}-{secrets.token_hex(4)}"
        self.nbytes = nbytes
        path = SHARED_MEMORY / self.name
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # fail here, not with SIGBUS, where memory is short
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._bytes = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    @staticmethod
    def size_for(tensors: list[torch.Tensor]) -> int:
        return max(ALIGNMENT_BYTES, sum(_aligned(t.numel() * t.element_size()) for t in tensors))

    def fill(self, named_tensors: list[tuple[str, torch.Tensor]]) -> dict[str, dict]:
        """Copy the tensors in, one after the other, and return their handles."""
        handles, start = {}, 0
        for name, tensor in named_tensors:
            whole = tensor.detach().contiguous()
            flat = flat_bytes(whole)
            self._bytes[start : start + flat.numel()].copy_(flat)
            handles[name] = {
                "kind": "shared_memory", "segment": self.name, "offset_bytes": start, "storage_bytes": flat.numel(),
                "dtype": dtype_name(whole.dtype), "shape": list(whole.shape), "stride": list(whole.stride()),
                "storage_offset": 0,
            }  # fmt: skip
            start += _aligned(flat.numel())
        return handles

    def unlink(self) -> None:
        """Free the name; the memory goes when the last process has let go of it."""
        self._bytes = None
        (SHARED_MEMORY / self.name).unlink(missing_ok=True)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
