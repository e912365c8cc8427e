"""What vLLM's sleep loses and no update brings: kept on the host while the engine sleeps.

At level 2 sleep discards all memory that was taken while the model was loaded. vLLM keeps the registered buffers, and
an update brings the parameters. What a model has beside both comes back with any values (vllm#53343): the slopes of
ALiBi in an attention implementation, or the scales of attention layers that a model holds in a dict, as those of
vLLM's Transformers backend were (mended by vllm#54941). At level 1 vLLM keeps everything itself.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from extensions.manifest import SHOWN
from extensions.model.drafter import DRAFT, drafter_of
from extensions.model.loading import processed_layers
from extensions.model.regions import memory_id
from extensions.model.walk import tensors_of

DERIVED_BYTES = 2**20  # a larger tensor of a layer that loading processes is derived from the layer's weights


class SleepError(RuntimeError):
    """An engine that may have lost, in its sleep, what no update brings."""


class KeepsAsleep:
    """Mixed into a vLLM worker: from `_weight_sync_watch_sleep` on, its sleep keeps what it would lose."""

    _weight_sync_asleep: "Copies | None" = None
    _weight_sync_slept_unwatched = False

    def _weight_sync_watch_sleep(self) -> None:
        """Stand before this worker's `sleep` and `wake_up`, where the engine may sleep. Done once."""
        config = getattr(self.vllm_config, "model_config", None)
        if not getattr(config, "enable_sleep_mode", False) or self._weight_sync_asleep is not None:
            return
        if not hasattr(self, "sleep"):  # the receiver of vLLM's own transfer is no worker: see `keep_asleep`
            return
        self._weight_sync_asleep = Copies(self.sleep, self.wake_up)
        self._weight_sync_slept_unwatched = (
            getattr(self, "_sleep_mode_backend", None) is not None
        )  # made when it sleeps
        self.sleep, self.wake_up = self._weight_sync_sleep, self._weight_sync_wake_up

    def _weight_sync_sleep(self, level: int = 1) -> None:
        if level > 1:
            self._weight_sync_asleep.take(lambda: lost_asleep(self._weight_sync_models(), self.device).values())
        self._weight_sync_asleep.sleep(level)
        self._weight_sync_asleep.is_awake = False

    def _weight_sync_wake_up(self, tags: list[str] | None = None) -> None:
        self._weight_sync_asleep.wake_up(tags)
        if tags is None or "weights" in tags:
            self._weight_sync_asleep.put_back()

    def _weight_sync_refuse_lost(self) -> None:
        """Raise SleepError where the engine slept before it was watched, and has tensors that it may have lost."""
        if not self._weight_sync_slept_unwatched:
            return
        if lost := [*lost_asleep(self._weight_sync_models(), self.device, derived_bytes=0)]:
            raise SleepError(
                "this engine slept before its extension was called first. Sleep at level 2 loses tensors that no update"
                f" brings, here {len(lost)}: {', '.join(lost[:SHOWN])}. Start the engine anew, and call update_state()"
                " on its workers before it sleeps; nothing was touched"
            )

    def _weight_sync_models(self) -> list[torch.nn.Module]:
        drafter = drafter_of(self.model_runner, self.vllm_config)
        return [self.model_runner.get_model(), *([drafter.model] if drafter else [])]


def keep_asleep(workers: type, keeper_of: Callable[[Any], KeepsAsleep | None]) -> None:
    """Have workers of this class keep, from their next sleep on, what they would lose. Done once for a class.

    It is for a keeper that is no worker, as the one of vLLM's own transfer: `keeper_of(worker)` has it, or None.
    """
    if hasattr(workers.sleep, "keeps_asleep"):
        return
    slept, woke = workers.sleep, workers.wake_up

    @functools.wraps(slept)
    def sleep(worker: Any, level: int = 1) -> None:
        if (keeper := keeper_of(worker)) is None:
            slept(worker, level)
            return
        if keeper._weight_sync_asleep is None:
            keeper._weight_sync_asleep = Copies(functools.partial(slept, worker), functools.partial(woke, worker))
        keeper._weight_sync_sleep(level)

    @functools.wraps(woke)
    def wake_up(worker: Any, tags: list[str] | None = None) -> None:
        keeper = keeper_of(worker)
        if keeper is None or keeper._weight_sync_asleep is None:
            woke(worker, tags)
        else:
            keeper._weight_sync_wake_up(tags)

    sleep.keeps_asleep = True
    workers.sleep, workers.wake_up = sleep, wake_up


class Copies:
    """Copies on the host, and the worker's methods that were there before; of an engine that is awake, no copies."""

    def __init__(self, sleep: Callable[[int], None], wake_up: Callable[[list[str] | None], None]) -> None:
        self.sleep, self.wake_up = sleep, wake_up
        self.is_awake = True  # what was taken while the model was loaded can be read
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []  # (in the model, on the host)

    def take(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Copy, unless the engine is asleep already, at whatever level: its memory can't be read then."""
        if self.is_awake:
            self._held = [(tensor, tensor.to("cpu", copy=True)) for tensor in tensors()]

    def put_back(self) -> None:
        """Give the tensors the values that they had, and drop the copies."""
        self.is_awake = True
        held, self._held = self._held, []
        for tensor, copy in held:
            tensor.copy_(copy)


def lost_asleep(
    models: Iterable[torch.nn.Module], device: torch.device, derived_bytes: int = DERIVED_BYTES
) -> dict[str, torch.Tensor]:
    """`{path: tensor}` of what models compute with on this device beside their parameters and registered buffers.

    models: the model, then its draft model. Of layers that are processed when they are loaded, tensors larger than
    `derived_bytes` are left out.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, model in zip(("", DRAFT), models, strict=False):
        found |= {f"{prefix}{path}": tensor for path, tensor in _of_model(model, device, derived_bytes)}
    return found


def _of_model(model: torch.nn.Module, device: torch.device, derived_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    registered = {memory_id(tensor) for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    processed = tuple(f"{path}." for path in processed_layers(model))
    for path, tensor in tensors_of(model).items():
        there = tensor.device.type == device.type and tensor.numel() and memory_id(tensor) not in registered
        if there and not (tensor.nbytes > derived_bytes and path.startswith(processed)):
            yield path, tensor
