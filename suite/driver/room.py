"""Which engines have room beside each other: arithmetic with the memory of GPUs and of the host."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import psutil

from suite import models
from suite.driver.engines import EngineKey
from suite.stages import Stage

ENGINE_BYTES = 2.0e9  # of a GPU, for an engine without its weights: CUDA's context, cache, graphs, buffers
TRAINERS_BYTES = 5.0e9  # of a trainer's GPU: CUDA's contexts of the kept trainers and of the spare ones
GPU_FRACTION = 0.92  # of a GPU's memory may be planned for
HOST_BYTES = 4e9  # of host memory, for an engine and what it loads
MIN_ENGINES = 3  # at once, whatever the host's memory
GB = 1e9


def engines_at_once(started: int) -> int:
    """How many engines may be there at once: one that starts ahead must not crowd out the `started` ones."""
    return max(MIN_ENGINES, int(psutil.virtual_memory().available / HOST_BYTES) + started)


class Room:
    """What the GPUs of a machine have room for.

    Args:
        stages: by name.
        gpu_memory: bytes of every GPU, by UUID. One whose memory is not known counts as large enough.
        keeping: the names of the subjects whose trainers keep a copy of what they sent.
    """

    def __init__(
        self, stages: dict[str, Stage], gpu_memory: dict[str, int | None], keeping: Collection[str] = ()
    ) -> None:
        self._stages, self._keeping = stages, keeping
        self.gpu_memory = {uuid: found for uuid, found in gpu_memory.items() if found is not None}

    def too_large(self, keys: Sequence[EngineKey]) -> str:
        """Why a test's engines and the trainer of their stage have no room even alone; empty where they have."""
        for device in sorted({device for key in keys for device in self._places_of(key)}):
            if self._wanted_bytes(device, keys, keys[0]) > self._planned_bytes(device):
                found = self.gpu_memory[device] / GB
                share = f"the GPU has {found:.1f} GB, of which {GPU_FRACTION:.0%} may be planned for"
                return f"{keys[0].model} on {keys[0].stage}: {self._sum(device, keys)}; {share}"
        return ""

    def lacking(self, key: EngineKey, there: Iterable[EngineKey], trained: EngineKey | None) -> set[str]:
        """The GPUs on which an engine lacks room beside those that are there, and beside a trainer at work.

        Engines add up. Of the trainers one holds a model, that of `trained`; the others have let go of theirs.
        """
        others = [other for other in there if other != key]
        if not others:
            return set()
        places = self._places_of(key)
        return {gpu for gpu in places if self._wanted_bytes(gpu, [key, *others], trained) > self._planned_bytes(gpu)}

    def devices_of(self, key: EngineKey) -> tuple[str, ...]:
        """The UUIDs of an engine's GPUs; none on a CPU."""
        return self._stages[key.stage].devices_of_engine(key.copy)

    def _places_of(self, key: EngineKey) -> set[str]:
        """The GPUs of an engine and of its stage's trainer."""
        return {*self.devices_of(key), *self._stages[key.stage].trainer_devices}

    def _planned_bytes(self, device: str) -> float:
        return GPU_FRACTION * self.gpu_memory.get(device, math.inf)

    def _wanted_bytes(self, device: str, keys: Sequence[EngineKey], trained: EngineKey | None) -> float:
        return sum(nbytes for nbytes, _ in self._parts(device, keys, trained))

    def _parts(self, device: str, keys: Sequence[EngineKey], trained: EngineKey | None) -> Iterator[tuple[float, str]]:
        """What takes a GPU's memory: bytes, and of what they are."""
        for key in keys:
            if device in self.devices_of(key):
                yield self._bytes(key, self._stages[key.stage].engine_ranks), "of the engine's weights"
                yield ENGINE_BYTES, "beside them"
        if any(device in stage.trainer_devices for stage in self._stages.values()):
            yield TRAINERS_BYTES, "of trainers without theirs"
        if trained is not None and device in self._stages[trained.stage].trainer_devices:
            nbytes = self._bytes(trained, self._stages[trained.stage].trainer_world_size)
            yield nbytes, "of the trainer's weights"
            if trained.subject in self._keeping:
                yield self._bytes(trained, 1), "of what it sent last"

    def _sum(self, device: str, keys: Sequence[EngineKey]) -> str:
        """What makes up `_wanted_bytes` of a test's engines, in words."""
        parts = [f"{nbytes / GB:.1f} GB {what}" for nbytes, what in self._parts(device, keys, keys[0])]
        return f"{' + '.join(parts)} = {self._wanted_bytes(device, keys, keys[0]) / GB:.1f} GB on one GPU"

    def _bytes(self, key: EngineKey, ranks: int) -> float:
        """The weights of an engine's model in bfloat16, on one of so many ranks."""
        return 2 * models.MODELS[key.model].elements / ranks
