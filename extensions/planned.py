"""Weights by broadcast, straight to where they belong: one call to the workers an update, no copy on the way.

The plan (`extensions.plan`) knows of each announced tensor to which part of which parameter `load_weights` copies it.
Where that part is contiguous and of the same dtype, it is what the broadcast receives into. All other tensors are
received beside the model and loaded as `WorkerExtension` loads them.

    plan_update(manifest)     once for a manifest: refuses what does not fit the model, and returns the plan's digest
    receive_update(digest)    every update: receives all tensors in the order of the manifest, and loads them

The sender says the digest of what it sends first. Workers that expect another update touch nothing.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from extensions.bracket import Update, UpdateError
from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.group import Communicator, GroupError
from extensions.manifest import Announced, Manifest, manifest_of, parse
from extensions.model.load import DirectLoad, Load
from extensions.model.loading import new_load
from extensions.plan import Plan
from extensions.tensors import dtype_name

GROUP_BYTES = 512 * 2**20  # of tensors that are broadcast by one call: NCCL moves them by one kernel
DIGEST_BYTES = 32


@dataclass
class Agreed:
    """An update that a worker has planned.

    kept: which of the worker's kept plans it is of. load: kept for the next update where it holds nothing of the last.
    """

    digest: bytes
    announced: Announced
    plan: Plan | None
    kept: int
    load: Load | None = None
    batches: list[list[str]] = field(default_factory=list)


class PlannedWorkerExtension(WorkerExtension):
    """Receives a whole update by one call; give it to vLLM as `worker_extension_cls`.

    It has the methods of `WorkerExtension` too: tensors may still be sent one by one.
    """

    weight_sync_sender = "extensions.planned:PlannedSender"
    _weight_sync_agreed: Agreed | None = None

    def plan_update(self, manifest: Manifest) -> str:
        """Agree on the updates to come: `[{"name", "dtype", "shape"}, ...]` with full shapes, in the order of sending.

        Returns the digest that `receive_update` takes. Raises as `begin_update` does; nothing has been changed then,
        and what was agreed before is still agreed.
        """
        self._weight_sync_require_none()
        announced = parse(manifest)
        plans = self._weight_sync_plans()
        plan = plans.whole(self.model_runner.get_model(), self.vllm_config, announced)
        cut = [*batches(announced, GROUP_BYTES)]
        self._weight_sync_agreed = Agreed(digest_of(announced), announced, plan, plans.kept, batches=cut)
        return self._weight_sync_agreed.digest.hex()

    def receive_update(self, digest: str) -> int:
        """Receive and load the update that was agreed on, while `PlannedSender` sends it. Returns its tensors' number.

        The model computes with the new weights when this returns. Raises UpdateError without a plan of this digest, or
        where the model's tensors have moved since it was made: call `plan_update` again. Raises UpdateError where the
        sender sends another update, and GroupError as `WorkerExtension` does. Nothing was touched by an UpdateError;
        the group is given up then, so that no sender waits.
        """
        if self._weight_sync_group is None:
            raise GroupError("there is no group: call init_weight_update_group() on all workers first")
        try:
            agreed = self._weight_sync_require_agreed(digest)
            _require_sent(agreed.digest, self._weight_sync_group)
        except UpdateError as error:
            self._weight_sync_group.abort(str(error))
            raise
        update = self._weight_sync_open(agreed.load or self._weight_sync_load(agreed), agreed.announced)
        try:
            for names in agreed.batches:
                self._weight_sync_receive(update, names)
            received = self.end_update()
        except BaseException:
            self.abort_update()
            raise
        agreed.load = update.load.again() if isinstance(update.load, DirectLoad) else None
        return received

    def receive_alone(self, manifest: Manifest) -> int:
        """Receive tensors outside an update, in the order of the manifest. Returns their number.

        Raises as `update_weight` does outside an update.
        """
        if self._weight_sync_group is None:
            raise GroupError("there is no group: call init_weight_update_group() on all workers first")
        self._weight_sync_require_none()
        announced = parse(manifest)
        _require_sent(digest_of(announced), self._weight_sync_group)
        for names in batches(announced, GROUP_BYTES):
            staged = {name: self._weight_sync_staged(announced, name) for name in names}
            self._weight_sync_group.broadcast_all([*staged.values()], src=0)
            self._weight_sync_group.wait()
            self._weight_sync_accept(staged)
        return len(announced)

    def _weight_sync_receive(self, update: Update, names: list[str]) -> None:
        """Receive some tensors by one call: each where it belongs, or else beside the model, and load those."""
        places = {name: update.load.place(name) for name in names}
        staged = {n: self._weight_sync_staged(update.announced, n) for n, place in places.items() if place is None}
        placed = [name for name in names if name not in staged]
        if placed:
            update.load.written_past(placed)  # before: a broadcast that breaks off has written some
        received = [staged[name] if place is None else place for name, place in places.items()]
        self._weight_sync_group.broadcast_all(received, src=0)
        update.arrived.update(placed)
        if staged:
            update.take(staged)

    def _weight_sync_staged(self, announced: Announced, name: str) -> torch.Tensor:
        dtype, shape = announced[name]
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _weight_sync_load(self, agreed: Agreed) -> Load:
        return new_load(self.model_runner.get_model(), self.vllm_config, agreed.plan)

    def _weight_sync_require_agreed(self, digest: str) -> Agreed:
        self._weight_sync_require_none()
        agreed = self._weight_sync_agreed
        if agreed is None or agreed.digest.hex() != digest:
            found = "none" if agreed is None else agreed.digest.hex()[:12]
            raise UpdateError(f"expected the plan {digest[:12]!r}, found {found}: call plan_update(manifest) first")
        plans = self._weight_sync_plans()
        if plans.kept != agreed.kept or not plans.holds(self.model_runner.get_model()):
            self._weight_sync_agreed = None
            raise UpdateError(
                "the model's tensors have moved since the update was planned: call plan_update(manifest) again;"
                " nothing was touched"
            )
        return agreed


class PlannedSender(BroadcastSender):
    """The trainer's half: rank 0 of the group. It sends whole updates, by as few calls as the workers receive them."""

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest | None = None) -> int:
        """Broadcast every tensor, in the order of `plan_update`'s manifest. Returns the bytes sent.

        `manifest` is that of the tensors; where it is not given, all tensors are held at once to make it. When this
        returns, the workers have received all tensors and the next optimiser step may write to them. Raises ValueError
        where the tensors are not those of the manifest, and GroupError as `BroadcastSender.send` does.
        """
        if manifest is None:
            named_tensors = list(named_tensors)
            manifest = manifest_of(named_tensors)
        announced, named = parse(manifest), iter(named_tensors)
        self._group.broadcast_all([_as_tensor(digest_of(announced), self._group.device)], src=0)
        sent = 0
        for names in batches(announced, GROUP_BYTES):
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


def digest_of(announced: Announced) -> bytes:
    """The same for two updates of the same names, dtypes and shapes in the same order: DIGEST_BYTES bytes."""
    told = [[name, dtype_name(dtype), list(shape)] for name, (dtype, shape) in announced.items()]
    return hashlib.sha256(json.dumps(told).encode()).digest()


def batches(announced: Announced, limit: int) -> Iterator[list[str]]:
    """The names in their order, cut so that the tensors of each part have at most `limit` bytes, or are one."""
    names: list[str] = []
    total = 0
    for name, (dtype, shape) in announced.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if names and total + nbytes > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += nbytes
    if names:
        yield names


def _require_sent(expected: bytes, group: Communicator) -> None:
    """Hear what the sender is about to send. Raises UpdateError where it is another update."""
    told = _as_tensor(bytes(DIGEST_BYTES), group.device)
    group.broadcast_all([told], src=0)
    group.wait()
    found = bytes(told.tolist())
    if found != expected:
        raise UpdateError(f"expected the update {expected.hex()[:12]}, the sender sends {found.hex()[:12]}")


def _as_tensor(digest: bytes, device: torch.device) -> torch.Tensor:
    return torch.tensor([*digest], dtype=torch.uint8, device=device)
