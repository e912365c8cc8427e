"""Mutants that accept what they have to refuse, refuse it badly or answer wrongly: errors.*, names.*, update.zeroed."""

import contextlib
import math
import re
from collections.abc import Sequence

import torch

from extensions.bracket import UpdateError
from extensions.broadcast import WorkerExtension
from extensions.colocate import ColocateWorkerExtension
from extensions.manifest import ManifestError
from extensions.model.headers import checkpoint_layouts
from extensions.model.weights import effective_weights
from extensions.tensors import Shape
from suite.selftest.mutants.registry import ACCEPTED, BROADCAST, HANDLES, Loader, Meddles, Unchecked, mutant

LAYER = re.compile(r"model\.layers\.(\d+)\.")
JOINED = re.compile(r"\.(q|k|v|gate|up)_proj\.")


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


@mutant("errors.unknown_name", ACCEPTED, "vllm#51063", **BROADCAST)
class TakesLayersForAnotherRanks(WorkerExtension):
    """Passes over layers that it does not have, as if another rank of a pipeline had them."""

    def begin_update(self, manifest: list[dict]) -> int:
        return super().begin_update([entry for entry in manifest if self._mutant_has(entry["name"])])

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._weight_sync_accept({name: tensor for name, tensor in tensors.items() if self._mutant_has(name)})

    def _mutant_has(self, name: str) -> bool:
        layer = LAYER.match(name)
        return layer is None or int(layer[1]) < self.model_config.hf_config.num_hidden_layers


@mutant("errors.unknown_name", ACCEPTED, **BROADCAST)
class IgnoresOtherPrefixes(TakesLayersForAnotherRanks):
    """Passes over tensors whose names do not begin as its model's do."""

    def _mutant_has(self, name: str) -> bool:
        return name.startswith("model.")


@mutant("errors.unknown_name", r"not all tensors", **BROADCAST)
class RefusesByAllNames(WorkerExtension):
    """Refuses, and lists every tensor that there is, with the wrong one somewhere among them."""

    def begin_update(self, manifest: list[dict]) -> int:
        try:
            return super().begin_update(manifest)
        except ManifestError:
            raise ManifestError(f"the update does not fit: {[entry['name'] for entry in manifest]}") from None


@mutant("errors.missing_name", ACCEPTED, "prime-rl#2714", **BROADCAST)
class CountsJoinedWeights(Unchecked, WorkerExtension):
    """Takes a weight that vLLM joins from several tensors for complete when it has got one of them."""

    def begin_update(self, manifest: list[dict]) -> int:
        names = [entry["name"] for entry in manifest]
        brought, expected = ({JOINED.sub(".", name) for name in some} for some in (names, _known(self)))
        begins = super() if expected <= brought else super(Unchecked, self)
        return begins.begin_update(manifest)


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


@mutant("errors.shape", ACCEPTED, **BROADCAST)
class CutsWhatIsTooLong(WorkerExtension):
    """Loads as many elements of a tensor as there is room for."""

    def begin_update(self, manifest: list[dict]) -> int:
        known = _known(self)
        return super().begin_update(
            [{**e, "shape": [*self._mutant_taken(e["shape"], known.get(e["name"], e["shape"]))]} for e in manifest]
        )

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        shapes = {name: self._weight_sync_state.update.announced[name][1] for name in tensors}
        super()._weight_sync_accept(
            {name: tensor.view(-1)[: math.prod(shapes[name])].view(shapes[name]) for name, tensor in tensors.items()}
        )

    def _mutant_taken(self, found: Sequence[int], known: Sequence[int]) -> Sequence[int]:
        return known if math.prod(found) > math.prod(known) else found


@mutant("errors.shape", ACCEPTED, **BROADCAST)
class ReshapesWhatFits(CutsWhatIsTooLong):
    """Takes the elements of a tensor in their order, whatever its shape, if there are as many as it expects."""

    def _mutant_taken(self, found: Sequence[int], known: Sequence[int]) -> Sequence[int]:
        return known if math.prod(found) == math.prod(known) else found


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


@mutant("errors.dtype", ACCEPTED, **BROADCAST)
class AcceptsFloat8(WorkerExtension):
    """Takes numbers of 8 bits for weights, whose scales it does not ask for."""

    def begin_update(self, manifest: list[dict]) -> int:
        return super().begin_update(
            [{**e, "dtype": "bfloat16" if "float8" in e["dtype"] else e["dtype"]} for e in manifest]
        )

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._weight_sync_accept(
            {n: t.to(torch.bfloat16) if t.element_size() == 1 else t for n, t in tensors.items()}
        )


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


@mutant("update.zeroed", r"where one element is not zero", **BROADCAST)
class LooksAtTheFirstWeight(WorkerExtension):
    """Finds all weights zero where the first of them is."""

    def check_weights_changed(self) -> bool:
        _, weight = next(effective_weights(self.model_runner.get_model()))
        return not weight.any()


@mutant("update.zeroed", r"where one element is not zero", **BROADCAST)
class SumsUp(WorkerExtension):
    """Finds all weights zero where they add up to zero."""

    def check_weights_changed(self) -> bool:
        weights = effective_weights(self.model_runner.get_model())
        return all(weight.to(torch.float64).sum() == 0 for _, weight in weights)


@mutant("update.zeroed", r"zero in every element", **BROADCAST)
class SkipsZeros(Meddles, WorkerExtension):
    """Takes a tensor of zeros for one that has not arrived."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if tensor.any():
            load(name, tensor)


def _known(extension: object) -> dict[str, Shape]:
    """The shapes of the engine's own checkpoint, by name."""
    return {name: shape for name, (_, shape) in checkpoint_layouts(extension.model_config.model).items()}
