"""vLLM's native transfer by NCCL, tensor by tensor, in packs, or as sparse patches, sent by vLLM's own sender."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from suite.stages import Stage
from suite.subjects.broadcast import NO_HANDLES, unfit_on_gpus
from suite.subjects.counted import Contiguous
from suite.subjects.native import NO_DRAFTS, Native, lacks
from suite.subjects.native_versions import Api, installed
from suite.subjects.protocol import Tensors, Trainer, TrainerHalf, load

if TYPE_CHECKING:
    pass

NO_SPARSE = "sparse patches go by checkpoint names from vLLM 0.29 on; before, by those of the engine's fused parameters"


class NcclTrainer(TrainerHalf):
    """Has vLLM's sender of the installed release. It has no deadline: where a worker is gone, its process is ended."""

    _sender: Any = None

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Join as rank 0, in place of a sender there was."""
        self._sender = load(self.subject.sender_of(installed()))(address, port, world_size, self.subject.packed)

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Have vLLM's sender send, which waits for the engines' answer where it does so for its own client."""
        counted = Contiguous(tensors)
        self._sender.send(counted, acknowledged)
        return counted.bytes_sent

    def close(self) -> None:
        """Forget the sender: to leave its group would wait for workers that may hang."""
        self._sender = None


class NativeNccl(Native):
    """Dense tensors by NCCL.

    packed: whether many travel in one broadcast.
    """

    backend: ClassVar[str] = "nccl"
    roofline: ClassVar[str] = "broadcast"
    packed: ClassVar[bool] = False

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return NcclTrainer(self, trainer)

    def sender_of(self, api: Api) -> str:
        """`pkg.module:Class` of what drives vLLM's sender of a release."""
        return f"suite.subjects.native_senders:{'Trainer' if api.nccl_trainer_engine else 'Static'}Sender"

    def init_information(self, api: Api, address: str, port: int, rank_offset: int, world_size: int) -> dict[str, Any]:
        """Also whether tensors are packed, where a release asks here."""
        return super().init_information(api, address, port, rank_offset, world_size) | self.packing(api, "init")

    def update_information(self, manifest: list[dict], api: Api) -> dict[str, Any]:
        """Also whether tensors are packed, where a release asks here."""
        return super().update_information(manifest, api) | self.packing(api, "update")

    def packing(self, api: Api, at: str) -> dict[str, bool]:
        """Whether tensors are packed, where a release asks for it `at` "init" or "update"; else nothing."""
        return {"packed": self.packed} if api.nccl_packed_at == at else {}

    def unfit(self, stage: Stage) -> str:
        """NCCL takes one rank a GPU, and without a GPU it broadcasts nothing."""
        if stage.kind == "cpu":
            return f"{stage.name}: without a GPU there is no NCCL; native-gloo is examined there"
        return unfit_on_gpus(stage)


class NativeNcclPacked(NativeNccl):
    """The same in packs of 1 GiB."""

    packed: ClassVar[bool] = True


class NativeSparse(NativeNccl):
    """Patches that hold every element of every tensor: an update is whole, as for every subject."""

    backend: ClassVar[str] = "sparse_nccl"

    def sender_of(self, api: Api) -> str:
        """Patches have a sender of their own."""
        return "suite.subjects.native_senders:SparseSender"

    def packing(self, api: Api, at: str) -> dict[str, bool]:
        """Nothing: patches are never packed."""
        return {}

    def update_information(self, manifest: list[dict], api: Api) -> dict[str, Any]:
        """Also how many elements every patch has."""
        elements = [math.prod(entry["shape"]) for entry in manifest]
        return super().update_information(manifest, api) | {"num_updates_list": elements}

    def unfit(self, stage: Stage) -> str:
        """As for dense tensors, and not before the release that takes checkpoint names."""
        return super().unfit(stage) or ("" if installed().sparse_takes_checkpoints else f"{stage.name}: {NO_SPARSE}")


_WORKER, _LACKS = "suite.subjects.native:NativeWorker", lacks(installed()) | NO_HANDLES
SUBJECTS = (
    NativeNccl("native-nccl", _WORKER, _LACKS),
    NativeNcclPacked("native-nccl-packed", _WORKER, _LACKS),
    NativeSparse("native-sparse", _WORKER, _LACKS | NO_DRAFTS),
)
