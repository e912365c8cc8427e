"""What planned extensions share: a worker plans an update once, and a digest then names the one that comes."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from extensions.bracket import Update, UpdateBracket, UpdateError
from extensions.manifest import Announced, Manifest, parse
from extensions.model.drafter import DRAFT, DraftLoad, parted
from extensions.model.load import Load
from extensions.pieces import GROUP_BYTES, STAGED_BYTES, Groups, cut, room_for, whole
from extensions.tensors import dtype_name

DIGEST_BYTES = 32


@dataclass
class Agreed:
    """An update that a worker has planned.

    kept: the kept plans that it was made with, of the model and of the draft model.
    groups: the groups in which it travels, by whether tensors are cut.
    load: kept for the next update where it holds nothing of the last.
    beside_bytes: the most bytes of a group that can't be received where they belong.
    """

    digest: bytes
    announced: Announced
    kept: tuple[int, int]
    groups: dict[bool, Groups]
    load: Load | DraftLoad | None
    beside_bytes: int


class PlansUpdates(UpdateBracket):
    """Mixed into a vLLM worker."""

    _weight_sync_agreed: Agreed | None = None
    _weight_sync_group_bytes, _weight_sync_staged_bytes = GROUP_BYTES, STAGED_BYTES

    def plan_update(self, manifest: Manifest) -> str:
        """Agree on the updates to come: `[{"name", "dtype", "shape"}, ...]` with full shapes, in the order of sending.

        Returns the digest that names the update from then on. Raises as `begin_update` does. In that case nothing has
        changed, and what was agreed before still holds.
        """
        self._weight_sync_require_none()
        announced = parse(manifest)
        digest = digest_of(announced)
        if self._weight_sync_has_planned(digest.hex()):
            return digest.hex()
        load = self._weight_sync_load(announced)
        in_groups, in_pieces = self._weight_sync_group_bytes, self._weight_sync_staged_bytes
        groups = {False: whole(announced, in_groups), True: cut(announced, in_pieces)}
        beside_bytes = room_for(groups[False], lambda piece: load.place(piece.name) is None)
        kept = self._weight_sync_counts()
        self._weight_sync_agreed = Agreed(digest, announced, kept, groups, load.again(), beside_bytes)
        return digest.hex()

    def _weight_sync_has_planned(self, digest: str) -> bool:
        """Whether this update was planned last, and the model's tensors have not moved since."""
        agreed = self._weight_sync_agreed
        if agreed is None or agreed.digest.hex() != digest or agreed.kept != self._weight_sync_counts():
            return False
        model, drafter = self.model_runner.get_model(), self._weight_sync_drafter()
        if drafter is None:
            return self._weight_sync_plans().holds(model)
        of_model, of_drafter = parted(agreed.announced)
        if of_model and not self._weight_sync_plans().holds(model):
            return False
        return not of_drafter or self._weight_sync_plans(DRAFT).holds(drafter.model)

    def _weight_sync_counts(self) -> tuple[int, int]:
        """Which plans are kept now, of the model and of the draft model; see `Kept.kept`."""
        return self._weight_sync_plans().kept, self._weight_sync_plans(DRAFT).kept

    def _weight_sync_require_agreed(self, digest: str) -> Agreed:
        """The planned update. Raises UpdateError where another was planned, or the model's tensors have moved."""
        self._weight_sync_require_none()
        agreed = self._weight_sync_agreed
        if agreed is None or agreed.digest.hex() != digest:
            found = "none" if agreed is None else agreed.digest.hex()[:12]
            raise UpdateError(f"expected the plan {digest:.12}, found {found}: call plan_update(manifest) first")
        if not self._weight_sync_has_planned(digest):
            self._weight_sync_agreed = None
            raise UpdateError(
                "the model's tensors have moved since the update was planned: call plan_update(manifest) again;"
                " nothing was touched"
            )
        return agreed

    def _weight_sync_move(self, agreed: Agreed, move: Callable[[Update], None]) -> int:
        """One whole update: `move` moves all its tensors. Returns how many there were."""
        load = agreed.load or self._weight_sync_load(agreed.announced)
        agreed.load = None  # until the update has succeeded: what one that fails has left is not used again
        moved = self._weight_sync_move_by(load, agreed.announced, move)
        agreed.load = load.again()
        return moved

    def _weight_sync_move_by(self, load: Load | DraftLoad, announced: Announced, move: Callable[[Update], None]) -> int:
        """As `_weight_sync_move`, for tensors that a load takes."""
        update = self._weight_sync_open(load, announced)
        try:
            move(update)
            return self.end_update()
        except BaseException:
            self.abort_update()
            raise


def digest_of(announced: Announced) -> bytes:
    """The same for two updates of the same names, dtypes and shapes in the same order: DIGEST_BYTES bytes."""
    told = [[name, dtype_name(dtype), list(shape)] for name, (dtype, shape) in announced.items()]
    return hashlib.sha256(json.dumps(told).encode()).digest()
