"""What both reference extensions share: the bracket around an update, and the check that something arrived.

    begin_update(manifest)      nothing is touched unless the manifest fits the model
    ... tensors arrive ...      in any order
    end_update()                all of them, or an error

The states of `update_state()`: "ready", "updating" (inside the bracket), "inconsistent" (an update failed after it had
begun to write; only a whole new update makes the weights right again).
"""

import torch

from extensions.manifest import ManifestError, check, parse, require_name
from extensions.model.expected import expected_weights
from extensions.model.loading import Load, new_load, processed_layers
from extensions.model.weights import all_zero


class UpdateError(RuntimeError):
    """An update that can't go on. The message says what became of the weights."""


class UpdateBracket:
    """Mixed into a vLLM worker, whose `__init__` does not call ours: state starts as class attributes.

    After an update the engine's prefix cache still holds keys and values of the old weights: the driver calls
    `reset_prefix_cache()` on the engine after `end_update()`, as vLLM's own weight-transfer API asks of its callers.
    """

    _weight_sync_load: Load | None = None
    _weight_sync_pending: dict | None = None
    _weight_sync_failed: bool = False  # a load in the update under way has
    _weight_sync_inconsistent: bool = False

    def begin_update(self, manifest: list[dict]) -> int:
        """Announce all tensors of an update, `[{"name", "dtype", "shape"}, ...]` with full (unsharded) shapes.

        Returns how many will be awaited. Raises ManifestError, and leaves everything as it was, where names are
        missing, unknown or there twice, or shapes or dtypes don't fit; UpdateError inside another update.
        """
        if self._weight_sync_load is not None:
            raise UpdateError("an update is under way: call end_update() or abort_update() first; nothing was touched")
        announced = parse(manifest)
        model = self.model_runner.get_model()
        check(announced, *expected_weights(model, self.model_config.hf_config))
        self._weight_sync_load, self._weight_sync_pending = new_load(model, self.vllm_config), announced
        try:
            self._weight_sync_load.begin()
        except BaseException:
            self.abort_update()
            raise
        return len(announced)

    def end_update(self) -> int:
        """Finish the update. Returns how many tensors were loaded since `begin_update`, which is all of them.

        Raises UpdateError where announced tensors have not arrived; the update is aborted then.
        """
        if self._weight_sync_load is None:
            raise UpdateError("no update is under way: call begin_update(manifest) first")
        waiting = [name for name, expected in self._weight_sync_pending.items() if expected is not None]
        if waiting:
            became = self.abort_update()
            raise UpdateError(f"{len(waiting)} announced tensors have not arrived, first {waiting[0]}; {became}")
        count = len(self._weight_sync_pending)
        try:
            self._weight_sync_load.end()
            _synchronize(self.device)
        except BaseException:
            self.abort_update()  # a new update has to find every layer ready for it
            raise
        self._weight_sync_load = self._weight_sync_pending = None
        self._weight_sync_inconsistent = False
        return count

    def abort_update(self) -> str:
        """Give up the update under way, if any, and say what became of the weights."""
        load, self._weight_sync_load, self._weight_sync_pending = self._weight_sync_load, None, None
        self._weight_sync_failed = False
        if load is not None:
            before, self._weight_sync_inconsistent = self._weight_sync_inconsistent, True  # where abort() raises
            self._weight_sync_inconsistent = not load.abort() or before
        if self._weight_sync_inconsistent:
            return "part of the weights is new: the model is inconsistent until a whole update succeeds"
        return "the weights are as they were before the update"

    def update_state(self) -> str:
        """`ready`, `updating` or `inconsistent`."""
        if self._weight_sync_load is not None:
            return "updating"
        return "inconsistent" if self._weight_sync_inconsistent else "ready"

    def check_weights_changed(self) -> bool:
        """Whether every weight element that the model computes with is zero, and there is at least one.

        The name is that of vLLM's RLHF examples, where an update to zeros proves that weights arrive. Raises
        UpdateError inside an update, when layers may have no weights at all.
        """
        if self._weight_sync_load is not None:
            raise UpdateError("an update is under way: call end_update() or abort_update() before looking at weights")
        return all_zero(self.model_runner.get_model())[0]

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load tensors that have arrived, inside the bracket or, where the model allows it, outside.

        None is loaded unless all are what they should be.
        """
        for name in tensors:
            require_name(name)
        load = self._weight_sync_load
        if load is None:
            self._weight_sync_accept_alone(tensors)
            return
        self._weight_sync_expect(tensors)
        try:
            load.load(tensors)
        except BaseException:
            self._weight_sync_failed = True  # who knows how much of it was taken
            raise
        self._weight_sync_pending.update(dict.fromkeys(tensors))

    def _weight_sync_expect(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            expected, found = self._weight_sync_awaited(name), (tensor.dtype, tuple(tensor.shape))
            if expected != found:
                raise UpdateError(f"{name}: announced as {expected}, arrived as {found}; it was not loaded")

    def _weight_sync_awaited(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """What has been announced under this name, unless it has arrived."""
        if self._weight_sync_failed:
            raise UpdateError(f"{name}: a load of this update has failed before; call abort_update() and begin again")
        if name not in self._weight_sync_pending:
            raise UpdateError(f"{name} was not announced in this update's manifest; it was not loaded")
        expected = self._weight_sync_pending[name]
        if expected is None:
            raise UpdateError(f"{name} has arrived before in this update; the second was not loaded")
        return expected

    def _weight_sync_accept_alone(self, tensors: dict[str, torch.Tensor]) -> None:
        model = self.model_runner.get_model()
        self._weight_sync_refuse_alone(model)
        required, optional = expected_weights(model, self.model_config.hf_config)
        known = required | optional
        for name in tensors:
            if name not in known:
                raise ManifestError(f"{name} is no weight of this model; nothing was touched")
        announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        check(announced, {}, {name: known[name] for name in tensors})
        before, self._weight_sync_inconsistent = self._weight_sync_inconsistent, True  # where the load fails
        new_load(model, self.vllm_config).load(tensors)
        _synchronize(self.device)
        self._weight_sync_inconsistent = before

    def _weight_sync_refuse_alone(self, model: torch.nn.Module) -> None:
        if layers := processed_layers(model):
            raise UpdateError(
                f"{len(layers)} layers of this model hold repacked or quantised weights, first {layers[0]}: a tensor"
                " loaded on its own would be lost or corrupt them. Call begin_update(manifest) before and end_update()"
                " after; nothing was touched"
            )


def _synchronize(device: torch.device) -> None:
    """An update is acknowledged when the device has it, not when the copies are queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
