"""Weights by broadcast, straight to where they belong: one call to the workers an update, no copy on the way.

The plan (`extensions.plan`) knows of each announced tensor to which part of which parameter `load_weights` copies it.
Where that part is contiguous and of the same dtype, it is what the broadcast receives into. All other tensors are
received beside the model and loaded as `WorkerExtension` loads them.

    plan_update(manifest)     once for a manifest: refuses what does not fit the model, and returns the plan's digest
    receive_update(digest)    every update: receives all tensors in the order of the manifest, and loads them

The sender says the digest of what it sends first. Workers that expect another update touch nothing.
"""

from collections.abc import Iterable, Iterator

import torch

from extensions.agreed import DIGEST_BYTES, GROUP_BYTES, PlansUpdates, batches, digest_of, places_of
from extensions.bracket import Update, UpdateError
from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.manifest import Announced, Manifest, manifest_of, parse
from extensions.tensors import dtype_name


class PlannedWorkerExtension(PlansUpdates, WorkerExtension):
    """Receives a whole update by one call; give it to vLLM as `worker_extension_cls`.

    It has the methods of `WorkerExtension` too: tensors may still be sent one by one.
    """

    weight_sync_sender = "extensions.planned:PlannedSender"

    def receive_update(self, digest: str) -> int:
        """Receive and load the update that was agreed on, while `PlannedSender` sends it. Returns its tensors' number.

        The model computes with the new weights when this returns. Raises UpdateError without a plan of this digest, or
        where the model's tensors have moved since it was made: call `plan_update` again. Raises UpdateError where the
        sender sends another update, and GroupError as `WorkerExtension` does. Nothing was touched by an UpdateError;
        the group is given up then, so that no sender waits.
        """
        self._weight_sync_joined()
        try:
            agreed = self._weight_sync_require_agreed(digest)
            self._weight_sync_require_sent(agreed.digest)
        except UpdateError as error:
            self._weight_sync_refuse(str(error))
            raise
        return self._weight_sync_move(agreed, self._weight_sync_receive)

    def receive_alone(self, manifest: Manifest) -> int:
        """Receive tensors outside an update, in the order of the manifest. Returns their number.

        Raises as `update_weight` does outside an update.
        """
        group = self._weight_sync_joined()
        self._weight_sync_require_none()
        announced = parse(manifest)
        self._weight_sync_require_sent(digest_of(announced))
        for names in batches(announced, self._weight_sync_group_bytes):
            staged = {name: self._weight_sync_staged(announced, name) for name in names}
            group.broadcast_all([*staged.values()], src=0)
            group.wait()
            self._weight_sync_accept(staged)
        return len(announced)

    def _weight_sync_refuse(self, reason: str) -> None:
        """Give the group up, so that the sender of an update that is not received does not wait."""
        if self._weight_sync_group is not None:
            self._weight_sync_group.abort(reason)

    def _weight_sync_require_sent(self, expected: bytes) -> None:
        """Hear what the sender is about to send. Raises UpdateError where it is another update."""
        group = self._weight_sync_group
        told = _as_tensor(bytes(DIGEST_BYTES), group.device)
        group.broadcast_all([told], src=0)
        group.wait()
        found = bytes(told.tolist())
        if found != expected:
            raise UpdateError(f"expected the update {expected.hex()[:12]}, the sender sends {found.hex()[:12]}")

    def _weight_sync_receive(self, update: Update, names: list[str]) -> None:
        """Receive some tensors by one call: each where it belongs, or else beside the model, and load those."""
        places = places_of(update, names)
        staged = {name: self._weight_sync_staged(update.announced, name) for name in names if name not in places}
        into = places | staged
        self._weight_sync_group.broadcast_all([into[name] for name in names], src=0)
        if staged:
            update.take(staged)

    def _weight_sync_staged(self, announced: Announced, name: str) -> torch.Tensor:
        dtype, shape = announced[name]
        return torch.empty(shape, dtype=dtype, device=self.device)


class PlannedSender(BroadcastSender):
    """The trainer's half: rank 0 of the group. It sends whole updates, by as few calls as the workers receive them."""

    _group_bytes = GROUP_BYTES
    _manifest: Manifest | None = None  # of the last update, and what was made of it
    _announced: Announced
    _digest: bytes
    _batches: list[list[str]]

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None) -> int:
        """Broadcast every tensor, in the order of `plan_update`'s manifest. Returns the bytes sent.

        `manifest` is that of the tensors; where it is not given, all tensors are held at once to make it. When this
        returns, the workers have received all tensors and the next optimiser step may write to them. Raises ValueError
        where the tensors are not those of the manifest, and GroupError as `BroadcastSender.send` does.
        """
        if manifest is None:
            named_tensors = list(named_tensors)
            manifest = manifest_of(named_tensors)
        if manifest != self._manifest:
            announced = parse(manifest)
            self._manifest, self._announced = [dict(entry) for entry in manifest], announced
            self._digest, self._batches = digest_of(announced), [*batches(announced, self._group_bytes)]
        announced, named, sent = self._announced, iter(named_tensors), 0
        self._group.broadcast_all([_as_tensor(self._digest, self._group.device)], src=0)
        for names in self._batches:
            tensors = [self._next(named, name, announced) for name in names]
            self._group.broadcast_all(tensors, src=0)
            sent += sum(tensor.nbytes for tensor in tensors)
        self._group.wait()
        return sent

    def _next(self, named: Iterator[tuple[str, torch.Tensor]], expected: str, announced: Announced) -> torch.Tensor:
        name, tensor = next(named, ("nothing", torch.empty(0)))
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != announced[expected]:
            found = f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            self._group.abort(f"the sender has another tensor than {expected}: {found}")
            raise ValueError(f"expected {expected} as in the manifest, found {found}")
        return tensor.detach().to(self._group.device).contiguous()


def _as_tensor(digest: bytes, device: torch.device) -> torch.Tensor:
    return torch.tensor([*digest], dtype=torch.uint8, device=device)
