"""Tensors on their way to a sender that is not the suite's own: their bytes are counted."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from suite.processes.blame import of_the_suite
from suite.subjects.protocol import Tensors

if TYPE_CHECKING:
    import torch


class Counted:
    """As they are."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.bytes_sent = tensors, 0

    def manifest(self) -> list[dict]:
        """[{"name", "dtype", "shape"}, ...] of all, in their order."""
        return self._tensors.manifest()

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        self.bytes_sent = 0
        for name, tensor in self._tensors:
            with of_the_suite("hand a tensor over"):
                given = self._given(tensor)
            self.bytes_sent += given.numel() * given.element_size()
            yield name, given

    def _given(self, tensor: "torch.Tensor") -> "torch.Tensor":
        return tensor


class Contiguous(Counted):
    """Contiguous, as NCCL reads them."""

    def _given(self, tensor: "torch.Tensor") -> "torch.Tensor":
        return tensor.detach().contiguous()
