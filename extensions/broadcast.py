"""Weights by broadcast. The trainer is rank 0 of a group; the workers of one or several engines are the other ranks.

`WorkerExtension` is the engine's half and `BroadcastSender` the trainer's.
"""

from collections.abc import Iterable

import torch

from extensions.bracket import UpdateBracket
from extensions.group import Communicator, GroupError, stateless_init_process_group
from extensions.manifest import ManifestError
from extensions.ranks import rank_in_engine
from extensions.tensors import dtype_of, is_shape


class WorkerExtension(UpdateBracket):
    """Receives tensors one by one from the trainer; give it to vLLM as `worker_extension_cls`.

    Call the methods on all workers through `collective_rpc`, while the trainer's `BroadcastSender` does its half.
    """

    weight_sync_sender = "extensions.broadcast:BroadcastSender"
    _weight_sync_group: Communicator | None = None

    def init_weight_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int
    ) -> None:
        """Join the trainer's group as rank `rank_offset` + this worker's rank in its engine, see `rank_in_engine`.

        `world_size` counts the trainer and the workers of all engines and of all their data-parallel replicas. Each
        engine has its own `rank_offset`. A group that was joined before is closed first. Raises like
        `stateless_init_process_group`.
        """
        self._weight_sync_watch_sleep()
        self.close_weight_update_group()
        self._weight_sync_group = stateless_init_process_group(
            master_address, master_port, rank_offset + rank_in_engine(self), world_size, self.device
        )

    def update_weight(self, name: str, dtype: "str | torch.dtype", shape: "list[int] | tuple[int, ...]") -> None:
        """Receive one tensor, of this dtype and full shape, and load it under its checkpoint name.

        The tensor is received first and judged then: an error leaves the group usable, and the trainer does not wait.
        Only a malformed dtype or shape is refused before anything is received. Raises GroupError without a group,
        TypeError or ValueError for a malformed dtype, ManifestError for a malformed shape, and ManifestError or
        UpdateError where the model can't take the tensor.
        """
        group = self._weight_sync_joined()
        if not is_shape(shape):
            raise ManifestError(f"{name!r:.120}: a shape is a list of sizes, found {shape!r:.99}; nothing was received")
        tensor = torch.empty(tuple(shape), dtype=dtype_of(dtype), device=self.device)
        group.broadcast(tensor, src=0)
        if self._weight_sync_state.update is None:
            group.wait()  # inside the bracket, end_update() waits once for all tensors
        self._weight_sync_accept({name: tensor})

    def end_update(self) -> int:
        """As in UpdateBracket. Raises GroupError where a broadcast failed; the update is aborted then."""
        if self._weight_sync_state.update is not None and self._weight_sync_group is not None:
            try:
                self._weight_sync_group.wait()
            except GroupError as error:
                raise GroupError(f"{error}; {self.abort_update()}") from error
        return super().end_update()

    def close_weight_update_group(self) -> None:
        """Leave the group, if there is one. An update under way can only be aborted after that."""
        group, self._weight_sync_group = self._weight_sync_group, None
        if group is not None:
            if self._weight_sync_state.update is not None:
                self._weight_sync_state.update.failed = True  # what the group was receiving may not have arrived
            group.close()

    def _weight_sync_joined(self) -> Communicator:
        """The group that was joined. Raises GroupError where there is none."""
        if self._weight_sync_group is None:
            raise GroupError("there is no group: call init_weight_update_group() on all workers first")
        return self._weight_sync_group


class BroadcastSender:
    """The trainer's half: rank 0 of the group, which receives nothing."""

    def __init__(
        self,
        master_address: str,
        master_port: int,
        world_size: int,
        device: "torch.device | str | int",
        timeout_s: float | None = None,
        join_timeout_s: float | None = None,
    ) -> None:
        """Serve the group at `master_address:master_port` and wait for `world_size - 1` workers.

        `timeout_s` and `join_timeout_s` as in `stateless_init_process_group`.
        """
        self._group = stateless_init_process_group(
            master_address, master_port, 0, world_size, device, timeout_s, join_timeout_s
        )

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Broadcast every tensor, in the order of the workers' `update_weight` calls. Returns the bytes sent.

        When this returns, the workers have received all tensors and the next optimiser step may write to them. Raises
        GroupError where a worker died or takes longer than the group's timeout.
        """
        device, sent = self._group.device, 0
        for _, tensor in named_tensors:
            self._group.broadcast(tensor.detach().to(device).contiguous(), src=0)
            sent += tensor.numel() * tensor.element_size()
        self._group.wait()
        return sent

    def abort(self, reason: str) -> None:
        """Give the group up, from any thread. A send() in another thread raises GroupError with `reason` within 2 s."""
        self._group.abort(reason)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()
