"""Mutants that take tensors for what most of them are: sent.*."""

import torch

from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.colocate import ColocateWorkerExtension
from extensions.tensors import flat_bytes
from suite.conformance.test_sent import BUFFER_BYTES
from suite.selftest.mutants.registry import (
    BROADCAST,
    DIFFER,
    HANDLES,
    NOT_THERE,
    PACKAGE,
    Loader,
    Meddles,
    Named,
    mutant,
)


@mutant("sent.mixed_dtypes", DIFFER, "prime-rl#3480", **BROADCAST)
class TakesTheFirstDtype(Meddles, WorkerExtension):
    """Reads the bytes of every tensor as numbers of the first tensor's dtype."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        first, _ = next(iter(self._weight_sync_state.update.announced.values()))
        read = flat_bytes(tensor).view(first)
        load(name, read.repeat(2)[: tensor.numel()].view(tensor.shape))


@mutant("sent.mixed_dtypes", DIFFER, "prime-rl#3524", **BROADCAST)
class ConvertsToTheFirstDtype(Meddles, WorkerExtension):
    """Has every tensor pass through the first tensor's dtype, as in a buffer that it shares with it."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        first, _ = next(iter(self._weight_sync_state.update.announced.values()))
        load(name, tensor.to(first))


class ByAddress(BroadcastSender):
    """Sends as many elements as a tensor has, in the order in which they lie in memory from its first one on."""

    def send(self, named_tensors: Named) -> int:
        return super().send((name, self._from_its_address(tensor)) for name, tensor in named_tensors)

    @staticmethod
    def _from_its_address(tensor: torch.Tensor) -> torch.Tensor:
        dense = torch.empty(tensor.shape).stride()
        return tensor.as_strided(tensor.shape, dense, tensor.storage_offset())


@mutant("sent.strides", DIFFER, "vllm#50641", **BROADCAST)
class IsSentByAddress(WorkerExtension):
    """Its sender takes every tensor for a contiguous one."""

    weight_sync_sender = f"{PACKAGE}.sent:ByAddress"


@mutant("sent.large", rf"{DIFFER}|without a zero", "verl#5980", **HANDLES)
class LoadsOneBuffer(Meddles, ColocateWorkerExtension):
    """Loads of each tensor what one buffer of its transport holds, and zeros for the rest."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        held = BUFFER_BYTES["gpu" if tensor.is_cuda else "cpu"] // tensor.element_size()
        if tensor.numel() > held:
            tensor = tensor.clone()
            tensor.view(-1)[held:] = 0
        load(name, tensor)


@mutant("sent.biases", NOT_THERE, "axolotl#3527", **BROADCAST)
class OnlyDotWeight(Meddles, WorkerExtension):
    """Loads tensors whose names end in `.weight`, and no others."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name.endswith(".weight"):
            load(name, tensor)
