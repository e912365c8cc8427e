"""Mutants of planned updates, whose plan, order, groups or handles are not those of the update that comes."""

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch

from extensions.agreed import Agreed
from extensions.bracket import Update, UpdateError
from extensions.manifest import Announced, Manifest
from extensions.model.load import Load
from extensions.planned import PlannedSender, PlannedWorkerExtension
from extensions.planned_colocate import KeptHandleSender, Opened, PlannedColocateWorkerExtension
from suite.selftest.mutants.registry import BROADCAST, DIFFER, HANDLES, NOT_THERE, PACKAGE, Named, mutant

LAST = 5  # tensors of an update that are left out
KEYS, VALUES = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")


@mutant("update.exact", NOT_THERE, "vllm#48941", **BROADCAST)
class WritesWhereTheTensorsWere(PlannedWorkerExtension):
    """Moves the model's tensors before every update, and writes to where they were in the first."""

    def receive_update(self, digest: str) -> int:
        kept = self.__dict__.setdefault("_mutant_kept", [])
        for parameter in self.model_runner.get_model().parameters():
            kept.append(parameter.data)
            parameter.data = parameter.data.clone()
        return super().receive_update(digest)

    def _weight_sync_require_agreed(self, digest: str) -> Agreed:
        return self._weight_sync_agreed

    def _weight_sync_open(self, load: Load, announced: Announced) -> Update:
        targets, target_now = self.__dict__.setdefault("_mutant_targets", {}), load._target

        def target_then(into: str) -> torch.Tensor:
            now = target_now(into)
            return targets.setdefault(into, now)

        load._target = target_then
        return super()._weight_sync_open(load, announced)


class SendsInAnotherOrder(PlannedSender):
    """Sends two tensors of one shape in another order than was announced, whatever the workers expect."""

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None) -> int:
        held = dict(named_tensors)
        other = {KEYS: VALUES, VALUES: KEYS}
        order = [other.get(name, name) for name in held]
        entries = {entry["name"]: entry for entry in manifest}
        return super().send([(name, held[name]) for name in order], [entries[name] for name in order])

    def _agree(self) -> bool:
        return unless_refused(super()._agree)


@mutant("update.exact", DIFFER, "sglang#14178", **BROADCAST)
class IgnoresTheDigest(PlannedWorkerExtension):
    """Receives what it has planned, whatever the sender says that it sends."""

    weight_sync_sender = f"{PACKAGE}.planned:SendsInAnotherOrder"

    def _weight_sync_agree(self, digest: bytes, is_cut: bool) -> bool:
        return unless_refused(functools.partial(super()._weight_sync_agree, digest, is_cut))


def unless_refused(agree: Callable[[], bool]) -> bool:
    """What the ranks have agreed on; whole tensors where they have not."""
    with contextlib.suppress(UpdateError):
        return agree()
    return False


@mutant("update.exact", NOT_THERE, "slime#929", **BROADCAST)
class LeavesTheLastOut(PlannedWorkerExtension):
    """Receives the last tensors of an update, loads none of them, and counts them as loaded."""

    def _weight_sync_open(self, load: Load, announced: Announced) -> Update:
        last, place = {*[*announced][-LAST:]}, load.place

        def place_of_others(name: str) -> torch.Tensor | None:
            found = place(name)
            return found.clone() if found is not None and name in last else found

        def but_the_last(taken: Callable) -> Callable:
            return lambda given: taken(_without(given, last))

        load.place, load.unwritten = place_of_others, list
        load.load, load.load_pieces = but_the_last(load.load), but_the_last(load.load_pieces)
        return super()._weight_sync_open(load, announced)


def _without(given: dict | list, names: set[str]) -> dict | list:
    """Tensors by name, or pieces that begin with theirs, without those of some names."""
    if isinstance(given, dict):
        return {name: tensor for name, tensor in given.items() if name not in names}
    return [piece for piece in given if piece[0] not in names]


class SendsOneByOne(PlannedSender):
    """Sends every tensor in a group of its own."""

    _group_bytes = 1


@mutant("faults.trainer_killed", DIFFER, "vllm#57854", **BROADCAST, case="during")
class SaysReadyWhenBrokenOff(PlannedWorkerExtension):
    """Says that it is ready after an update that broke off."""

    weight_sync_sender = f"{PACKAGE}.planned:SendsOneByOne"
    _weight_sync_group_bytes = 1

    def update_state(self) -> str:
        return "ready"


class MovesItsTensors(KeptHandleSender):
    """Has every update's tensors somewhere else, and keeps those of the updates before."""

    def handles(self, named_tensors: Named) -> dict[str, dict[str, dict]]:
        self.__dict__.setdefault("_kept", []).append((self._held, self._segment))
        self._held, self._segment, self.made = [], None, {}
        return super().handles([(name, tensor.detach().clone()) for name, tensor in named_tensors])


@mutant("update.exact", NOT_THERE, "verl#7873", **HANDLES)
class ReadsStaleHandles(PlannedColocateWorkerExtension):
    """Reads the handles that it has opened first, whatever handles it is sent later."""

    weight_sync_sender = f"{PACKAGE}.planned:MovesItsTensors"

    def _weight_sync_open_handles(self, opened: str, ipc_handles: dict) -> Opened:
        there = self._weight_sync_opened
        return there if there.tensors else super()._weight_sync_open_handles(opened, ipc_handles)
