"""Mutants on an engine with a draft model: draft.*."""

import torch

from extensions.broadcast import WorkerExtension
from extensions.model.drafter import DRAFT
from suite.selftest.mutants.registry import BROADCAST, DIFFER, Loader, Meddles, mutant


@mutant("draft.stale", r"update_state\(\) not to say ready", "vllm-ascend#13209", **BROADCAST)
class CallsAStaleDraftReady(WorkerExtension):
    """Says that it is ready whatever weights the draft model has."""

    def update_state(self) -> str:
        return super().update_state().replace("stale draft", "ready")


@mutant("draft.stale", DIFFER, **BROADCAST)
class UpdatesTheDraftModelInstead(Meddles, WorkerExtension):
    """Leaves the model as it was where there is a draft model."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if name.startswith(DRAFT) or self._weight_sync_drafter() is None:
            load(name, tensor)


@mutant("draft.updated", DIFFER, "vllm#46725", **BROADCAST)
class LeavesTheDraftModel(Meddles, WorkerExtension):
    """Receives the draft model's tensors, and loads none of them."""

    def begin_update(self, manifest: list[dict]) -> int:
        count = super().begin_update(manifest)
        update = self._weight_sync_state.update
        if update.of_drafter:
            update.load._of_drafter.unwritten = list
        return count

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not name.startswith(DRAFT):
            load(name, tensor)


@mutant("draft.updated", DIFFER, **BROADCAST)
class LoadsDraftsIntoBoth(WorkerExtension):
    """Loads what comes for the draft model into the model too."""

    def end_update(self) -> int:
        brought = self.__dict__.pop("_mutant_brought", {})
        count = super().end_update()
        if brought:
            state = self._weight_sync_state
            super().begin_update(self._mutant_manifest)
            self._weight_sync_accept(brought)
            super().end_update()
            self._weight_sync_state = state
        return count

    def begin_update(self, manifest: list[dict]) -> int:
        self._mutant_manifest = [entry | {"name": entry["name"].removeprefix(DRAFT)} for entry in manifest]
        return super().begin_update(manifest)

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._weight_sync_accept(tensors)
        for name, tensor in tensors.items():
            if name.startswith(DRAFT):
                self.__dict__.setdefault("_mutant_brought", {})[name.removeprefix(DRAFT)] = tensor.clone()
