"""Weights by handles that are opened once: one call to the workers an update, and one copy, where the weights belong.

    plan_update(manifest)                    once for a manifest, as in `extensions.planned`
    copy_update(digest, opened, handles)     every update: copies the trainer's tensors to where they belong

A trainer that updates its weights in place has them at the same addresses in every update. So `KeptHandleSender` makes
handles once, and calls them by a name of their own, `opened`. It makes others, under another name, once any of the
tensors is somewhere else. A worker keeps the tensors that it has opened until it gets handles of another name.
"""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from extensions.agreed import Agreed, PlansUpdates
from extensions.bracket import Update, UpdateError
from extensions.colocate import ColocateWorkerExtension, HandleSender, of_device, opened_handle
from extensions.copying import Copy, copy_of
from extensions.devices import synchronize
from extensions.layout import Layout
from extensions.model.load import Load

Where = tuple[list[str], Layout]  # names and layout of tensors


@dataclass
class Copies:
    """Which tensors are copied where, found once for the updates by the same handles and the same plan.

    load: whose places these are. placed: the names of what `copy` copies. rest: tensors that have no place, and are
    loaded.
    """

    load: Load
    placed: list[str]
    copy: Copy
    rest: dict[str, torch.Tensor]


@dataclass
class Opened:
    """The tensors that a worker has opened by handles of one name. copies: where they go, once that was found."""

    name: str = ""
    tensors: dict[str, torch.Tensor] | None = None
    copies: Copies | None = None


class PlannedColocateWorkerExtension(PlansUpdates, ColocateWorkerExtension):
    """Copies a whole update by one call; give it to vLLM as `worker_extension_cls`."""

    weight_sync_sender = "extensions.planned_colocate:KeptHandleSender"
    _weight_sync_opened = Opened()
    _weight_sync_times: dict[str, float] | None = None

    def copy_update(self, digest: str, opened: str, ipc_handles: dict[str, dict[str, object]]) -> int:
        """Copy and load the update that was agreed on. Returns its tensors' number.

        opened: the name of the handles. ipc_handles: `{device id: {checkpoint name: handle}}`, as
        `update_weights_from_ipc_handles` takes them; empty where this worker has opened those of this name. The model
        computes with the new weights when this returns, and the sender's tensors may change.

        Raises UpdateError without a plan of this digest, where the model's tensors have moved since it was made, where
        handles of this name have not been opened, and where they are not those of the plan; ManifestError and
        HandleError as `update_weights_from_ipc_handles`. Nothing was touched then.
        """
        times = {"begun": time.monotonic()}
        agreed = self._weight_sync_require_agreed(digest)
        there = self._weight_sync_open_handles(opened, ipc_handles)
        if there.copies is None or there.copies.load is not agreed.load:
            _require_announced(agreed, there.tensors)
        times["check"] = time.monotonic()

        def move(update: Update) -> None:
            _copy(update, there)
            times["launch"] = time.monotonic()

        moved = self._weight_sync_move(agreed, move)
        self._weight_sync_times = times | {"copy": time.monotonic()}
        return moved

    def update_times(self) -> dict[str, float]:
        """When the parts of the last `copy_update` were over, on the machine's monotonic clock, its beginning first.

        They are: checked whether plan and handles hold, launched the copies, waited for them.
        """
        return self._weight_sync_times or {}

    def close_handles(self) -> None:
        """Let go of the trainer's memory."""
        self._weight_sync_opened = Opened()

    def _weight_sync_open_handles(self, opened: str, ipc_handles: dict) -> Opened:
        if opened == self._weight_sync_opened.name and opened:
            return self._weight_sync_opened
        own = self.report_device_id()
        if not ipc_handles:
            raise UpdateError(f"device {own} was sent no handles, and has opened none called {opened!r:.40}; send them")
        handles = of_device(own, ipc_handles)
        self.close_handles()  # first: memory that the sender has given back stays taken as long as it is open here
        tensors = {name: opened_handle(name, handle, self.device) for name, handle in handles.items()}
        self._weight_sync_opened = Opened(opened, tensors)
        return self._weight_sync_opened


class KeptHandleSender(HandleSender):
    """The trainer's half. It keeps the tensors of the last update, and their handles, until others come."""

    def __init__(self, device: "torch.device | str") -> None:
        """As HandleSender."""
        super().__init__(device)
        self.opened = ""  # the name of the handles that were made last
        self.made: dict[str, dict[str, dict]] = {}  # those handles
        self._where: Where | None = None  # of the tensors that they lead to; None where they lead to copies

    def handles(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, dict]]:
        """As HandleSender; `opened` is their name then. They are the same as before where the tensors are.

        Tensors that are not contiguous are copied, so that their handles are new every time.
        """
        named = list(named_tensors)
        if self._device.type != "cuda":  # the values are copied into shared memory every time
            before, self.made = self.made, super().handles(named)
            self.opened = self.opened if self.made == before else secrets.token_hex(16)
            return self.made
        names, tensors = [name for name, _ in named], [tensor for _, tensor in named]
        if self._where is not None and self._where[0] == names and self._where[1].holds(tensors):
            synchronize(self._device)
            return self.made
        self._where = None
        self.made, self.opened = super().handles(named), secrets.token_hex(16)
        if all(tensor.is_contiguous() for tensor in tensors):
            self._where = names, Layout(tensors)
        return self.made

    def release(self) -> None:
        """Let go of tensors and shared memory. Workers have to be sent new handles after that."""
        self.made, self._where, self.opened = {}, None, ""
        super().release()


def _copy(update: Update, opened: Opened) -> None:
    """Copy tensors to their places in the model, and load those that have none."""
    if opened.copies is None or opened.copies.load is not update.load:
        opened.copies = _copies(update.load, opened.tensors)
    copies = opened.copies
    if copies.placed:
        update.load.written_past(copies.placed)  # first: what breaks off has written some
    copies.copy()
    update.arrived.update(copies.placed)
    if copies.rest:
        update.take(copies.rest)


def _copies(load: Load, tensors: dict[str, torch.Tensor]) -> Copies:
    placed = {name: place for name in tensors if (place := load.place(name)) is not None}
    copy = copy_of([(place, tensors[name]) for name, place in placed.items()])
    return Copies(load, [*placed], copy, {name: tensor for name, tensor in tensors.items() if name not in placed})


def _require_announced(agreed: Agreed, tensors: dict[str, torch.Tensor]) -> None:
    """Raise UpdateError where what was opened is not what was planned."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != agreed.announced:
        wrong = [n for n in {*found, *agreed.announced} if found.get(n) != agreed.announced.get(n)]
        raise UpdateError(
            f"{len(wrong)} tensors are not those of the plan, first {min(wrong)}: planned as"
            f" {agreed.announced.get(min(wrong))}, found {found.get(min(wrong))}; nothing was touched"
        )
