"""What planned extensions share: a worker plans the updates to come once, and is told by a digest which one comes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from extensions.bracket import Update, UpdateBracket, UpdateError
from extensions.manifest import Announced, Manifest, parse
from extensions.model.load import DirectLoad, Load
from extensions.model.loading import new_load
from extensions.plan import Plan
from extensions.tensors import dtype_name

GROUP_BYTES = 512 * 2**20  # of tensors that are moved together
DIGEST_BYTES = 32


@dataclass
class Agreed:
    """An update that a worker has planned.

    kept: which of the worker's kept plans it is of. batches: the names in their order, cut at GROUP_BYTES.
    load: kept for the next update where it holds nothing of the last.
    """

    digest: bytes
    announced: Announced
    plan: Plan | None
    kept: int
    batches: list[list[str]]
    load: Load | None = None


class PlansUpdates(UpdateBracket):
    """Mixed into a vLLM worker."""

    _weight_sync_agreed: Agreed | None = None
    _weight_sync_group_bytes = GROUP_BYTES

    def plan_update(self, manifest: Manifest) -> str:
        """Agree on the updates to come: `[{"name", "dtype", "shape"}, ...]` with full shapes, in the order of sending.

        Returns the digest by which an update is called then. Raises as `begin_update` does; nothing has been changed
        then, and what was agreed before is still agreed.
        """
        self._weight_sync_require_none()
        announced = parse(manifest)
        plans = self._weight_sync_plans()
        plan = plans.whole(self.model_runner.get_model(), self.vllm_config, announced)
        cut = [*batches(announced, self._weight_sync_group_bytes)]
        self._weight_sync_agreed = Agreed(digest_of(announced), announced, plan, plans.kept, cut)
        return self._weight_sync_agreed.digest.hex()

    def _weight_sync_require_agreed(self, digest: str) -> Agreed:
        """What was agreed on. Raises UpdateError where it is another update, or the model's tensors have moved."""
        self._weight_sync_require_none()
        agreed, plans = self._weight_sync_agreed, self._weight_sync_plans()
        if agreed is None or agreed.digest.hex() != digest:
            found = "none" if agreed is None else agreed.digest.hex()[:12]
            raise UpdateError(f"expected the plan {digest:.12}, found {found}: call plan_update(manifest) first")
        if plans.kept != agreed.kept or not plans.holds(self.model_runner.get_model()):
            self._weight_sync_agreed = None
            raise UpdateError(
                "the model's tensors have moved since the update was planned: call plan_update(manifest) again;"
                " nothing was touched"
            )
        return agreed

    def _weight_sync_move(self, agreed: Agreed, move: Callable[[Update, list[str]], None]) -> int:
        """One whole update: `move` moves the tensors of these names. Returns how many there were."""
        load = agreed.load or new_load(self.model_runner.get_model(), self.vllm_config, agreed.plan)
        update = self._weight_sync_open(load, agreed.announced)
        try:
            for names in agreed.batches:
                move(update, names)
            moved = self.end_update()
        except BaseException:
            self.abort_update()
            raise
        agreed.load = load.again() if isinstance(load, DirectLoad) else None
        return moved


def places_of(update: Update, names: list[str]) -> dict[str, torch.Tensor]:
    """Where tensors may be written to as they are, which is put down as done: what breaks off has written some."""
    found = {name: place for name in names if (place := update.load.place(name)) is not None}
    if found:
        update.load.written_past(found)
        update.arrived.update(found)
    return found


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
