"""Shared memory for the tensors of an update, where trainer and engine compute on CPUs."""

import os
import re
import secrets
from pathlib import Path

import torch

from extensions.tensors import dtype_name, flat_bytes

SHARED_MEMORY = Path("/dev/shm")
SEGMENT_NAME = re.compile(r"weight-sync-[A-Za-z0-9-]{1,80}")
RUN_ID = "WEIGHT_SYNC_RUN_ID"
ALIGNMENT_BYTES = 64  # tensors begin at multiples of this: a view in another dtype needs a multiple of its element size


class SharedSegment:
    """One file in shared memory, which its user alone can read. Raises OSError where memory is short."""

    def __init__(self, nbytes: int) -> None:
        # A killed trainer leaves its segment behind. Whoever ends the run finds it by the run's id.
        run = re.sub(r"[^A-Za-z0-9]", "", os.environ.get(RUN_ID, ""))[:40] or "x"
        self.name = f"weight-sync-{run}-{os.getpid()}-{secrets.token_hex(4)}"
        self.nbytes = nbytes
        path = SHARED_MEMORY / self.name
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # raises where memory is short; a write would be a SIGBUS
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._bytes = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    @staticmethod
    def size_for(tensors: list[torch.Tensor]) -> int:
        """The bytes that a segment needs to hold these tensors."""
        return max(ALIGNMENT_BYTES, sum(_aligned(t.numel() * t.element_size()) for t in tensors))

    def fill(self, named_tensors: list[tuple[str, torch.Tensor]]) -> dict[str, dict]:
        """Copy the tensors in, one after the other. Returns `{name: handle}`, which `open_handle` takes."""
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
        """Remove the file. The memory is freed when the last process has unmapped it."""
        self._bytes = None
        (SHARED_MEMORY / self.name).unlink(missing_ok=True)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
