"""Updates of what has changed, by broadcast: positions and values, written in place through the plan.

One step of an optimiser leaves most bfloat16 weights as they were, at the learning rates of reinforcement learning. So
`SparseSender` keeps a copy of what it sent last, compares with it bit by bit, and sends the elements that differ. Where
so many do that a whole update is faster (SPARSE_SHARE), it sends that.

    plan_update(manifest)     as in `extensions.planned`
    receive_update(digest)    every update: receives what has changed, or all

The plan knows where each element of a tensor goes. A tensor that it copies as it is, into layers whose parameters are
as they were loaded, is written element by element. Any other, repacked, quantised, converted or cast, is sent whole
where it has changed, with all tensors that its layers are made of.

Nothing is written over other weights than those that were compared. Each update has a version, which a worker holds
once it has it. A worker forgets it before anything is loaded, by whatever way, and where its model's tensors have moved
or are not as they were left (`Sample`). The sender forgets it before it sends. Unless every rank names the same
version, the update is whole.
"""

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from extensions.agreed import Agreed
from extensions.bracket import Update, UpdateError
from extensions.changes import Changes, Sent
from extensions.elements import Segment, elements_on
from extensions.group import GroupError
from extensions.manifest import Announced, Manifest, manifest_of
from extensions.model.drafter import DraftLoad
from extensions.model.load import Load, LoadError
from extensions.model.loading import partial_load
from extensions.model.places import Places, Sample, part_of_plan, places_of
from extensions.patches import EACH, WHOLE, Chunk, chunks_of, merged, received
from extensions.pieces import cut, part_of
from extensions.plan import Plan
from extensions.planned import (
    NO_VERSION,
    REFUSED,
    VERSION_BYTES,
    PlannedSender,
    PlannedWorkerExtension,
    Versions,
    agree,
    hear,
    in_step,
    shown,
)
from extensions.staging import Staging

TAKES_CHANGES = b"\1" * VERSION_BYTES  # said by a worker as its next version


@dataclass(frozen=True)
class Held:
    """The weights that a worker has: the update's plan, its version, and what some elements were then."""

    agreed: Agreed
    version: bytes
    sample: Sample


@dataclass
class Placed:
    """Where the elements of an update go in a worker's model.

    plan: None where there is none, and for an engine with a draft model. bare: loads what is sent element by element
    alone, and is kept for the next update. sample: of the model's parameters, kept likewise.
    """

    agreed: Agreed
    plan: Plan | None
    places: Places
    sample: Sample
    bare: Load | None = None


class SparseWorkerExtension(PlannedWorkerExtension):
    """Receives what has changed by one call; give it to vLLM as `worker_extension_cls`.

    It has the methods of `PlannedWorkerExtension`, and takes the updates of a `PlannedSender` too.
    """

    weight_sync_sender = "extensions.sparse:SparseSender"
    _weight_sync_held: Held | None = None
    _weight_sync_placed: Placed | None = None

    def takes_changes(self) -> bool:
        """Whether an update may be of what has changed alone: by this method such an extension is known."""
        return True

    def plan_update(self, manifest: Manifest) -> str:
        """As PlannedWorkerExtension. On a GPU the first call compiles what writes elements."""
        elements_on(self.device)
        return super().plan_update(manifest)

    def receive_update(self, digest: str) -> int:
        """As PlannedWorkerExtension. Returns how many tensors the update has, changed or not.

        Raises LoadError where positions come that are none of their tensor's, and the model is inconsistent then.
        """
        agreed = self._weight_sync_called(digest)
        needs_pieces = agreed.beside_bytes > self._weight_sync_staged_bytes
        own = Versions(self._weight_sync_version(agreed), TAKES_CHANGES)
        told = hear(self._weight_sync_group, agreed.digest, needs_pieces, own)
        _, sender = told[0]
        if is_sparse(told):
            self._weight_sync_receive_changes(agreed)
        else:
            if exchanges_units(told):
                self._weight_sync_tell_units(agreed)
            self._weight_sync_receive(agreed, any(is_cut for is_cut, _ in told))
        if sender.next != NO_VERSION:
            sample = self._weight_sync_places(agreed).sample
            sample.take()
            self._weight_sync_held = Held(agreed, sender.next, sample)
        return len(agreed.announced)

    def _weight_sync_version(self, agreed: Agreed) -> bytes:
        """The version of the weights that the model has; NO_VERSION where that is not sure."""
        held, drafter = self._weight_sync_held, self._weight_sync_drafter()
        ready = self.update_state() == "ready" and drafter is None  # no changes are sent to an engine that drafts
        if held is None or held.agreed is not agreed or not ready or not held.sample.holds():
            self._weight_sync_held = None
            return NO_VERSION
        return held.version

    def _weight_sync_open(self, load: Load | DraftLoad, announced: Announced) -> Update:
        """As UpdateBracket. Whatever is loaded, what the model has then is no version that a sender has sent."""
        self._weight_sync_held = None
        return super()._weight_sync_open(load, announced)

    def _weight_sync_accept_alone(self, tensors: dict[str, torch.Tensor]) -> None:
        self._weight_sync_held = None
        super()._weight_sync_accept_alone(tensors)

    def _weight_sync_places(self, agreed: Agreed) -> Placed:
        """Where the elements of an update go; found once for a plan."""
        placed = self._weight_sync_placed
        if placed is None or placed.agreed is not agreed:
            model, plan = self.model_runner.get_model(), None
            if self._weight_sync_drafter() is None:
                plan = self._weight_sync_plans().whole(model, self.vllm_config, agreed.announced)
            places = places_of(model, self.vllm_config, plan, [*agreed.announced])
            placed = Placed(agreed, plan, places, Sample(model))
            self._weight_sync_placed = placed
        return placed

    def _weight_sync_load_part(self, placed: Placed, whole: Announced) -> Load:
        """What loads those tensors of an update that are sent whole, beside what is written element by element."""
        bare, placed.bare = placed.bare, None
        if bare is not None and not whole:
            return bare
        plan = part_of_plan(placed.plan, whole) if placed.plan is not None else None
        return partial_load(self.model_runner.get_model(), self.vllm_config, plan)

    def _weight_sync_tell_units(self, agreed: Agreed) -> None:
        """Have the sender hear which tensors this rank can't write element by element."""
        group = self._weight_sync_joined()
        units = torch.tensor(self._weight_sync_places(agreed).places.units, dtype=torch.int32, device=group.device)
        for rank in range(1, group.world_size):
            group.broadcast_all([units if rank == group.rank else torch.empty_like(units)], src=rank)

    def _weight_sync_receive_changes(self, agreed: Agreed) -> None:
        """Receive what has changed, and write it. Nothing of it is kept."""
        group, all_moved = self._weight_sync_joined(), False
        placed = self._weight_sync_places(agreed)
        names, itemsizes = [*agreed.announced], itemsizes_of(agreed.announced)

        def receive(update: Update) -> None:
            nonlocal all_moved
            update.patches = True
            if update.announced:
                staging = Staging(update, self.device, self._weight_sync_staged_bytes)
                for pieces in cut(update.announced, self._weight_sync_staged_bytes):
                    group.broadcast_all(staging.places(pieces), src=0)
                    staging.settle(pieces)
            wrong = torch.zeros(1, dtype=torch.bool, device=self.device)
            update.load.written_past([])  # first: what breaks off has written some
            for chunk, buffers in received(group, chunks_of(counts, itemsizes), self.device):
                wrong |= self._weight_sync_write(chunk, placed.places, names, *buffers).bool()
            group.wait()
            all_moved = True
            if wrong.item():
                raise LoadError("positions were sent that are none of their tensor's")

        with in_step(group, lambda: all_moved):
            counts = self._weight_sync_counted(placed)
            whole = {name: agreed.announced[name] for name, count in zip(names, counts, strict=True) if count == WHOLE}
            load = self._weight_sync_load_part(placed, whole)
            self._weight_sync_move_by(load, whole, receive)
            placed.bare = load.again() if not whole else None

    def _weight_sync_counted(self, placed: Placed) -> list[int]:
        """How many elements of each tensor come. Raises LoadError where they can't be taken."""
        group, agreed, places = self._weight_sync_joined(), placed.agreed, placed.places
        told = torch.empty(len(agreed.announced), dtype=torch.int64, device=group.device)
        group.broadcast_all([told], src=0)
        group.wait()
        counts = told.tolist()
        for (name, (_, shape)), count, unit in zip(agreed.announced.items(), counts, places.units, strict=True):
            most = torch.Size(shape).numel() if unit == EACH else 0
            if not WHOLE <= count <= most:
                raise LoadError(f"{name}: {count} elements are sent, expected {most} at most")
            if count == WHOLE and placed.plan is None:
                raise LoadError(f"{name}: it is sent alone, expected a whole update: there is no plan of this model")
            if unit != EACH and (count == WHOLE) != (counts[unit] == WHOLE):
                raise LoadError(f"{name}: of what has to be loaded with it, not all is sent")
        return counts

    def _weight_sync_write(
        self, chunk: Chunk, places: Places, names: list[str], positions: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Write a chunk into the model. Returns what `Elements.write` does."""
        segments, begin = [], 0
        for number, count in chunk.parts:
            segments += [Segment(begin, count, into) for into in places.destinations[names[number]]]
            begin += count
        return elements_on(self.device).write(segments, positions, values)


class SparseSender(PlannedSender):
    """The trainer's half: rank 0 of the group. It keeps a copy of every tensor on its device."""

    _sent: Sent | None = None
    _version: bytes = NO_VERSION  # of what the workers have, which is what `_sent` holds
    _units: list[int] | None = None  # of the last whole update
    _compared: tuple[Changes | None] | None = None  # what was compared, and has not been sent

    def compare(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None
    ) -> int | None:
        """Find what has changed since the last update, before any engine has to pause. `send` sends that.

        manifest: as for `send`. Returns how many elements are to be sent one by one; None where the update is to be
        whole. The tensors may change when this returns: what is sent is what they are now. Raises ValueError where they
        are not those of the manifest.
        """
        if manifest is None:
            named_tensors = list(named_tensors)
            manifest = manifest_of(named_tensors)
        if self._compared is not None:
            self._version = NO_VERSION  # what was found then has not been sent, and is not found again
        if self._expect(manifest) or self._sent is None:
            self.forget()
            self._sent = Sent(self._announced, self._group.device, elements_on(self._group.device))
        version, self._version = self._version, NO_VERSION  # an error leaves none
        changes = self._sent.take(self._as_announced(named_tensors), None if version == NO_VERSION else self._units)
        self._version, self._compared = version, (changes,)
        return None if changes is None else changes.elements

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]] = (), manifest: Manifest | None = None) -> int:
        """Broadcast what has changed, or all. Returns the bytes sent.

        Compares first, unless `compare` has: then what that took is sent, whatever `named_tensors` are now. Raises
        ValueError where the tensors are not those of the manifest; the workers raise UpdateError then, and nothing was
        sent. Raises else as PlannedSender.
        """
        if self._compared is None:
            named_tensors = list(named_tensors)
            self._compare_or_refuse(named_tensors, manifest)
        (changes,), self._compared = self._compared, None
        version, self._version = self._version, NO_VERSION
        coming = Versions(NO_VERSION if changes is None else version, secrets.token_bytes(VERSION_BYTES))
        told = hear(self._group, self._digest, False, coming)
        if is_sparse(told):
            sent = self._send_changes(changes, iter(named_tensors))
        else:
            self._units = self._hear_units() if exchanges_units(told) else None
            groups = self._groups[any(is_cut for is_cut, _ in told)]
            sent = self._send(groups, self._in_step_with(iter(named_tensors)))
        self._version = NO_VERSION if self._units is None else coming.next
        return sent

    def forget(self) -> None:
        """Let go of the copy of what was sent. The next update is whole."""
        self._sent = self._compared = self._units = None
        self._version = NO_VERSION

    def close(self) -> None:
        """Leave the group, and let go of the copy."""
        self.forget()
        super().close()

    def _compare_or_refuse(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None) -> None:
        """Compare; where that fails, have the workers hear it, which have been called."""
        try:
            self.compare(named_tensors, manifest)
        except Exception:
            with contextlib.suppress(UpdateError, GroupError):
                agree(self._group, REFUSED, is_cut=False)
            raise

    def _as_announced(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, on the device that sends. Raises ValueError where they are not those of the manifest."""
        tensors = iter(named)
        for name, layout in self._announced.items():
            given, tensor = next(tensors, ("nothing", torch.empty(0)))
            if (given, (tensor.dtype, tuple(tensor.shape))) != (name, layout):
                raise ValueError(f"expected {name} as in the manifest, found {shown(given, tensor)}")
            yield name, tensor.detach().to(self._group.device)
        if (more := next(tensors, None)) is not None:
            raise ValueError(f"{more[0]} is not in the manifest")

    def _in_step_with(self, named: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """What is to be sent, one for each that is taken from `named`, which may be at its end."""
        for name, tensor in self._sent.tensors.items():
            next(named, None)
            yield name, tensor

    def _hear_units(self) -> list[int]:
        """Which tensors the workers can't write element by element, put together: a unit of one is a unit of all."""
        names = [*self._announced]
        told = [torch.empty(len(names), dtype=torch.int32, device=self._group.device) for _ in self._others]
        for rank, units in zip(self._others, told, strict=True):
            self._group.broadcast_all([units], src=rank)
        self._group.wait()
        return merged([units.tolist() for units in told], len(names))

    @property
    def _others(self) -> range:
        return range(1, self._group.world_size)

    def _send_changes(self, changes: Changes, named: Iterator[tuple[str, torch.Tensor]]) -> int:
        """Broadcast the counts, what is sent whole, and the elements. Returns the bytes."""
        moved = False
        with in_step(self._group, lambda: moved):
            counts = torch.tensor(changes.counts, dtype=torch.int64, device=self._group.device)
            self._group.broadcast_all([counts], src=0)
            sent = counts.nbytes
            by_name = zip(self._announced, changes.counts, strict=True)
            whole = {name: self._announced[name] for name, count in by_name if count == WHOLE}
            for pieces in cut(whole, self._staged_bytes) if whole else ():
                self._group.broadcast_all([part_of(self._sent.tensors[piece.name], piece) for piece in pieces], src=0)
                sent += sum(piece.nbytes for piece in pieces)
            for _ in named:
                pass
            for chunk in chunks_of(changes.counts, itemsizes_of(self._announced)):
                parts = changes.part(chunk)
                self._group.broadcast_all(parts, src=0)
                sent += sum(part.nbytes for part in parts)
            self._group.wait()
            moved = True
        return sent


Told = list[tuple[bool, Versions]]


def is_sparse(told: Told) -> bool:
    """Whether all ranks have the weights that the sender has compared with."""
    (_, sender), *workers = told
    return sender.held != NO_VERSION and all(worker.held == sender.held for _, worker in workers)


def exchanges_units(told: Told) -> bool:
    """Whether sender and workers can all move what has changed, and the workers say which tensors are units."""
    (_, sender), *workers = told
    return sender.next != NO_VERSION and all(worker.next == TAKES_CHANGES for _, worker in workers)


def itemsizes_of(announced: Announced) -> list[int]:
    """The bytes of an element of each tensor."""
    return [dtype.itemsize for dtype, _ in announced.values()]
