"""Weights by broadcast, straight to where they belong: one call to the workers an update, no copy on the way.

The plan (`extensions.plan`) knows of each announced tensor to which part of which parameter `load_weights` copies it.
Where that part is contiguous and of the same dtype, it is what the broadcast receives into. Other tensors pass through
a buffer of STAGED_BYTES, in pieces that the plan's regions are copied from: a rank's shard, or what is cast on the way.
What is more than a copy is received whole, and loaded as `WorkerExtension` loads it.

    plan_update(manifest)     once for a manifest: refuses what does not fit the model, and returns the plan's digest
    receive_update(digest)    every update: receives all tensors in the order of the manifest, and loads them

First every rank says the digest of the update that it is about to move. Where one says another, all refuse it, nothing
is touched, and the group can be used again.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from extensions.agreed import DIGEST_BYTES, Agreed, PlansUpdates, digest_of
from extensions.bracket import Update, UpdateError
from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.group import Communicator, GroupError
from extensions.group.basics import first_line
from extensions.manifest import Announced, Manifest, manifest_of, parse
from extensions.pieces import GROUP_BYTES, STAGED_BYTES, Groups, cut, part_of, whole
from extensions.staging import Staging
from extensions.tensors import dtype_name

REFUSED = bytes(DIGEST_BYTES)  # said in the place of a digest
VERSION_BYTES = 16
NO_VERSION = bytes(VERSION_BYTES)


class PlannedWorkerExtension(PlansUpdates, WorkerExtension):
    """Receives a whole update by one call; give it to vLLM as `worker_extension_cls`.

    It has the methods of `WorkerExtension` too: tensors may still be sent one by one.
    """

    weight_sync_sender = "extensions.planned:PlannedSender"

    def receive_update(self, digest: str) -> int:
        """Receive and load the update that was agreed on, while `PlannedSender` sends it. Returns its tensors' number.

        The model computes with the new weights when this returns. Raises UpdateError without a plan of this digest, or
        where the model's tensors have moved since it was made: call `plan_update` again. Raises UpdateError where the
        sender sends another update, or another worker refuses it. Nothing was touched by an UpdateError, and the sender
        hears of it. Raises GroupError as `WorkerExtension` does. What else it raises before all was received ends the
        group too: the sender is somewhere in the middle.
        """
        agreed = self._weight_sync_called(digest)
        is_cut = self._weight_sync_agree(agreed.digest, agreed.beside_bytes > self._weight_sync_staged_bytes)
        return self._weight_sync_receive(agreed, is_cut)

    def _weight_sync_called(self, digest: str) -> Agreed:
        """The update that is called by this digest. Has all others hear where there is none, and raises UpdateError."""
        self._weight_sync_joined()
        try:
            return self._weight_sync_require_agreed(digest)
        except UpdateError:
            self._weight_sync_refuse()
            raise

    def _weight_sync_receive(self, agreed: Agreed, is_cut: bool) -> int:
        """Receive a whole update, on which all ranks have agreed."""
        group = self._weight_sync_joined()
        buffer_bytes = self._weight_sync_staged_bytes if is_cut else agreed.beside_bytes
        awaited = deque(agreed.groups[is_cut])

        def receive(update: Update) -> None:
            staging = Staging(update, self.device, buffer_bytes)
            while awaited:
                group.broadcast_all(staging.places(awaited[0]), src=0)
                staging.settle(awaited.popleft())

        with in_step(group, lambda: not awaited):
            return self._weight_sync_move(agreed, receive)

    def receive_alone(self, manifest: Manifest) -> int:
        """Receive tensors outside an update, in the order of the manifest. Returns their number.

        Raises as `update_weight` does outside an update.
        """
        group = self._weight_sync_joined()
        self._weight_sync_require_none()
        announced = parse(manifest)
        self._weight_sync_agree(digest_of(announced), is_cut=False)
        for pieces in whole(announced, self._weight_sync_group_bytes):
            staged = {piece.name: self._weight_sync_staged(announced, piece.name) for piece in pieces}
            group.broadcast_all([*staged.values()], src=0)
            group.wait()
            self._weight_sync_accept(staged)
        return len(announced)

    def _weight_sync_agree(self, digest: bytes, is_cut: bool) -> bool:
        return agree(self._weight_sync_group, digest, is_cut)

    def _weight_sync_refuse(self) -> None:
        """Have the sender and all other workers hear that the update which they are about to move is refused."""
        with contextlib.suppress(UpdateError, GroupError):
            agree(self._weight_sync_joined(), REFUSED, is_cut=False)

    def _weight_sync_staged(self, announced: Announced, name: str) -> torch.Tensor:
        dtype, shape = announced[name]
        return torch.empty(shape, dtype=dtype, device=self.device)


class PlannedSender(BroadcastSender):
    """The trainer's half: rank 0 of the group. It sends whole updates, by as few calls as the workers receive them."""

    _group_bytes, _staged_bytes = GROUP_BYTES, STAGED_BYTES
    _manifest: Manifest | None = None  # of the last update, and what was made of it
    _announced: Announced
    _digest: bytes
    _groups: dict[bool, Groups]  # by whether they are cut

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None) -> int:
        """Broadcast every tensor, in the order of `plan_update`'s manifest. Returns the bytes sent.

        `manifest` is that of the tensors; where it is not given, all tensors are held at once to make it. When this
        returns, the workers have received all tensors and the next optimiser step may write to them. Raises UpdateError
        where a worker refuses the update or expects another, and nothing was sent then. Raises ValueError where the
        tensors are not those of the manifest, and GroupError as `BroadcastSender.send` does.
        """
        if manifest is None:
            named_tensors = list(named_tensors)
            manifest = manifest_of(named_tensors)
        self._expect(manifest)
        return self._send(self._groups[self._agree()], named_tensors)

    def _expect(self, manifest: Manifest) -> bool:
        """Be about to send the tensors of a manifest. Returns whether they are others than before."""
        if manifest == self._manifest:
            return False
        announced = parse(manifest)
        self._manifest, self._announced = [dict(entry) for entry in manifest], announced
        self._digest = digest_of(announced)
        self._groups = {False: whole(announced, self._group_bytes), True: cut(announced, self._staged_bytes)}
        return True

    def _send(self, groups: Groups, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Broadcast all tensors, on which all ranks have agreed. Returns the bytes sent."""
        named, sent, moved = iter(named_tensors), 0, False
        tensor = torch.empty(0)
        with in_step(self._group, lambda: moved):
            for pieces in groups:
                parts = []
                for piece in pieces:
                    if piece.start == 0:
                        tensor = self._next(named, piece.name)
                    parts.append(part_of(tensor, piece))
                self._group.broadcast_all(parts, src=0)
                sent += sum(piece.nbytes for piece in pieces)
            self._group.wait()
            moved = True
        if (more := next(named, None)) is not None:
            raise ValueError(f"{more[0]} is not in the manifest: it was not sent, the others were")
        return sent

    def _agree(self) -> bool:
        return agree(self._group, self._digest, is_cut=False)

    def _next(self, named: Iterator[tuple[str, torch.Tensor]], expected: str) -> torch.Tensor:
        name, tensor = next(named, ("nothing", torch.empty(0)))
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != self._announced[expected]:
            raise ValueError(f"expected {expected} as in the manifest, found {shown(name, tensor)}")
        return tensor.detach().to(self._group.device).contiguous()


def shown(name: str, tensor: torch.Tensor) -> str:
    """A tensor in a message."""
    return f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}"


@contextlib.contextmanager
def in_step(group: Communicator, all_moved: Callable[[], bool]) -> Iterator[None]:
    """Give the group up where an update breaks off before all was moved: a later one would receive what is left."""
    try:
        yield
    except BaseException as error:
        if not all_moved():
            group.abort(f"rank {group.rank} broke off the update: {type(error).__name__}: {first_line(error)}")
        raise


def agree(group: Communicator, digest: bytes, is_cut: bool) -> bool:
    """Hear of every rank which update it is about to move, and whether it needs the tensors in pieces.

    Returns whether any of them does. Raises UpdateError where a rank says another digest, on every rank.
    """
    return any(is_cut for is_cut, _ in hear(group, digest, is_cut, Versions()))


@dataclass(frozen=True)
class Versions:
    """What a rank says of the weights that it has, for updates of what has changed (`extensions.sparse`).

    Of a worker, `held` names the weights that it computes with, and `next` says whether it takes such updates. Of the
    sender, `held` names those that it has compared with, and `next` those that come now. Zeros say that there are none.
    """

    held: bytes = NO_VERSION
    next: bytes = NO_VERSION


def hear(group: Communicator, digest: bytes, is_cut: bool, versions: Versions) -> list[tuple[bool, Versions]]:
    """Say, and hear of every rank, what update is about to be moved, and of which weights. Raises as `agree`."""
    said = torch.zeros(group.world_size, DIGEST_BYTES + 1 + 2 * VERSION_BYTES, dtype=torch.uint8)
    own = [*digest, is_cut, *versions.held, *versions.next]
    said[group.rank] = torch.tensor(own, dtype=torch.uint8)
    said = said.to(group.device)
    for rank in range(group.world_size):
        group.broadcast_all([said[rank]], src=rank)
    group.wait()
    told = [bytes(row) for row in said.tolist()]
    for rank, found in enumerate(told):
        if found[:DIGEST_BYTES] != digest or digest == REFUSED:
            raise UpdateError(_refusal(rank, digest, found[:DIGEST_BYTES]))
    behind = DIGEST_BYTES + 1
    halves = ((bool(row[DIGEST_BYTES]), row[behind : behind + VERSION_BYTES], row[-VERSION_BYTES:]) for row in told)
    return [(is_cut, Versions(held, coming)) for is_cut, held, coming in halves]


def _refusal(rank: int, expected: bytes, found: bytes) -> str:
    if found == REFUSED:
        return f"rank {rank} refuses the update: its worker says why; nothing was touched"
    who = "the sender sends" if rank == 0 else f"the worker of rank {rank} expects"
    return f"expected the update {expected.hex()[:12]}, {who} {found.hex()[:12]}; nothing was touched"
