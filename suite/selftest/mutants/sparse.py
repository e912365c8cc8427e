"""Mutants of sparse updates: they find other elements than have changed, or write them elsewhere."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from extensions.bracket import Update
from extensions.elements import Found, Pair, PlainElements
from extensions.manifest import Announced, Manifest
from extensions.model.load import Load
from extensions.sparse import SparseSender, SparseWorkerExtension
from suite.selftest.mutants.registry import BROADCAST, DIFFER, PACKAGE, mutant

FLOATS = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@mutant("update.sparse", DIFFER, **BROADCAST)
class WritesToTheNeighbour(SparseWorkerExtension):
    """Writes each element that has changed in the place of its neighbour."""

    def _weight_sync_write(self, *told: Any) -> torch.Tensor:
        *others, positions, values = told
        return super()._weight_sync_write(*others, positions ^ 1, values)


@mutant("update.sparse", DIFFER, **BROADCAST)
class LeavesTheLastChangesOut(SparseWorkerExtension):
    """Writes all but the last of the elements that have changed in each tensor."""

    def _weight_sync_write(self, chunk: Any, places: Any, names: list[str], *buffers: torch.Tensor) -> torch.Tensor:
        kept, begin, wrong = list(buffers), 0, None
        for number, count in chunk.parts:
            one = type(chunk)(chunk.itemsize, chunk.begin, [(number, count - 1)])
            told = [buffer[begin : begin + count - 1] for buffer in kept]
            wrong = super()._weight_sync_write(one, places, names, *told)
            begin += count
        return wrong


@mutant("update.sparse", DIFFER, cpu="cpu-tp1")  # where layers are repacked: on GPUs nothing of the model is sent whole
class DropsWhatIsSentWhole(SparseWorkerExtension):
    """Of a sparse update, loads nothing of the tensors that are sent whole, and says nothing of it."""

    def _weight_sync_open(self, load: Load, announced: Announced) -> Update:
        if len(announced) < len(self._weight_sync_agreed.announced) and announced:
            load.load, load.load_pieces, load.unwritten = (lambda tensors: None), (lambda pieces: None), list
        return super()._weight_sync_open(load, announced)


class NumbersThatDiffer(PlainElements):
    """Compares numbers, to which -0 is 0."""

    def changed(self, pairs: Sequence[Pair], at_most: int) -> Found | None:
        """As Elements, of the elements that are other numbers."""
        floats = FLOATS[pairs[0][0].element_size()]
        alike = [(now.view(floats) == before.view(floats)) for now, before in pairs]
        return super().changed(
            [(torch.where(same, pair[1], pair[0]), pair[1]) for same, pair in zip(alike, pairs, strict=True)], at_most
        )


class ComparesNumbersSender(SparseSender):
    """Finds the elements that are other numbers than before."""

    def compare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None) -> Any:
        if self._sent is not None:
            self._sent._elements = NumbersThatDiffer()
        return super().compare(named_tensors, manifest)


@mutant("update.sparse", DIFFER, **BROADCAST)
class ComparesNumbers(SparseWorkerExtension):
    """Has a sender that compares numbers: a zero that has become -0 is not sent."""

    weight_sync_sender = f"{PACKAGE}.sparse:ComparesNumbersSender"


class KeepsTheFirstSender(SparseSender):
    """Compares tensors of one dimension, in every update, with the first that it has sent."""

    def compare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None) -> Any:
        first = self.__dict__.setdefault("_first", {})
        if self._sent is None:
            first.clear()
        for name in first:
            self._sent.tensors[name].copy_(first[name])
        found = super().compare(named_tensors, manifest)
        if not first:
            first.update({name: tensor.clone() for name, tensor in self._sent.tensors.items() if tensor.dim() == 1})
        return found

    def forget(self) -> None:
        self.__dict__.setdefault("_first", {}).clear()
        super().forget()


@mutant("update.sparse", DIFFER, **BROADCAST)
class ComparesWithTheFirst(SparseWorkerExtension):
    """Has a sender that compares norms with what it sent first: what has changed back since then is not sent."""

    weight_sync_sender = f"{PACKAGE}.sparse:KeepsTheFirstSender"
