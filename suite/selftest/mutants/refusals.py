"""Mutants that accept what they have to refuse, refuse it badly or answer wrongly: errors.*, names.*, update.zeroed."""

import contextlib

import torch

from extensions.bracket import UpdateError
from extensions.broadcast import WorkerExtension
from extensions.colocate import ColocateWorkerExtension
from extensions.manifest import ManifestError
from extensions.model.headers import checkpoint_layouts
from extensions.tensors import Shape
from suite.selftest.mutants.registry import ACCEPTED, BROADCAST, HANDLES, Loader, Meddles, Unchecked, mutant


@mutant("errors.unknown_name", ACCEPTED, "vllm#51063", **BROADCAST)
class IgnoresUnknownNames(WorkerExtension):
    """Passes over tensors that the model does not have."""

    def begin_update(self, manifest: list[dict]) -> int:
        return super().begin_update([entry for entry in manifest if entry["name"] in _known(self)])

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        announced = self._weight_sync_state.update.announced
        super()._weight_sync_accept({name: tensor for name, tensor in tensors.items() if name in announced})


@mutant("errors.unknown_name", r"an error that names", **BROADCAST)
class RefusesWithoutAName(WorkerExtension):
    """Refuses, and does not say which tensor is wrong."""

    def begin_update(self, manifest: list[dict]) -> int:
        try:
            return super().begin_update(manifest)
        except ManifestError:
            raise ManifestError("the update does not fit the model") from None


@mutant("errors.missing_name", ACCEPTED, "vllm#44814", **BROADCAST)
class AcceptsMissingNames(Unchecked, WorkerExtension):
    """Ends an update that lacks tensors as if it were whole."""


@mutant("errors.shape", ACCEPTED, "trl#6913", **BROADCAST)
class SwallowsErrors(WorkerExtension):
    """Catches whatever goes wrong in an update, and reports success."""

    def begin_update(self, manifest: list[dict]) -> int:
        with contextlib.suppress(Exception):
            super().begin_update(manifest)
        return len(manifest)

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        with contextlib.suppress(Exception):
            super().update_weight(name, dtype, shape)

    def end_update(self) -> int:
        with contextlib.suppress(Exception):
            super().end_update()
        return 0


@mutant("errors.shape", ACCEPTED, **BROADCAST)
class StretchesShapes(WorkerExtension):
    """Broadcasts the first row of a tensor that has too few."""

    def begin_update(self, manifest: list[dict]) -> int:
        known = _known(self)
        return super().begin_update(
            [{**entry, "shape": list(known.get(entry["name"]) or entry["shape"])} for entry in manifest]
        )

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        shapes = {name: self._weight_sync_state.update.announced[name][1] for name in tensors}
        super()._weight_sync_accept(
            {n: t if t.shape == shapes[n] else t[:1].expand(shapes[n]).contiguous() for n, t in tensors.items()}
        )


@mutant("errors.shape", r"from before the refused update", "vllm#57854", **HANDLES)
class LoadsBeforeItChecks(Meddles, Unchecked, ColocateWorkerExtension):
    """Finds a misshapen tensor when those before it have been loaded."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        try:
            load(name, tensor)
        except Exception as error:
            raise UpdateError(f"{name}: {error}") from error


@mutant("errors.dtype", ACCEPTED, "trl#3690", **BROADCAST)
class AcceptsIntegers(WorkerExtension):
    """Casts whatever it is given."""

    def begin_update(self, manifest: list[dict]) -> int:
        return super().begin_update([{**entry, "dtype": "bfloat16"} for entry in manifest])

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._weight_sync_accept({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


@mutant("errors.nested", r"an update is under way\s+found: success", "vllm#57854", **BROADCAST)
class RestartsWhenNested(WorkerExtension):
    """Gives up the update under way for another that begins."""

    def begin_update(self, manifest: list[dict]) -> int:
        self.abort_update()
        return super().begin_update(manifest)


@mutant("names.free", r"found: update_weights", cpu="cpu-tp1", gpu="gpu-split")
class TakesAWorkersName(WorkerExtension):
    """Has a method that vLLM's worker has had since 0.16."""

    def update_weights(self, update_info: dict) -> None:
        raise NotImplementedError


@mutant("update.zeroed", r"check_weights_changed\(\) to say False", **BROADCAST)
class AlwaysSaysZero(WorkerExtension):
    """Finds all weights zero, whatever they are."""

    def check_weights_changed(self) -> bool:
        return True


@mutant("update.zeroed", r"check_weights_changed\(\) to say True", **BROADCAST)
class NeverSaysZero(WorkerExtension):
    """Finds no weight zero, whatever they are."""

    def check_weights_changed(self) -> bool:
        return False


@mutant("update.zeroed", r"zero in every element", **BROADCAST)
class SkipsZeros(Meddles, WorkerExtension):
    """Takes a tensor of zeros for one that has not arrived."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if tensor.any():
            load(name, tensor)


def _known(extension: object) -> dict[str, Shape]:
    """The shapes of the engine's own checkpoint, by name."""
    return {name: shape for name, (_, shape) in checkpoint_layouts(extension.model_config.model).items()}
