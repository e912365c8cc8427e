"""The environment variables of the processes that engines and trainers run in."""

import os
from collections.abc import Iterable

from suite.stages import UPDATE_TIMEOUT_S, Stage

Variables = dict[str, str | None]  # environment variables to set, or to remove (None), over pytest's own

# The beginnings of the names that a process may still be given after it has imported vLLM. CUDA reads its variable when
# it initialises, NCCL its own when a group is made, and vLLM the last one each time that it serialises. Any other may
# have been read for good: by Python as it started, by torch (TORCHDYNAMO_DISABLE) or by vLLM as they were imported.
READ_LATE = ("CUDA_VISIBLE_DEVICES", "NCCL_", "VLLM_ALLOW_INSECURE_SERIALIZATION")


def of_trainer(device: str, visible: str | None, rank: int, stage: Stage | None) -> Variables:
    """What a rank of a trainer has in its environment.

    Args:
        device: "cpu" or "cuda".
        visible: its CUDA_VISIBLE_DEVICES; None for unset.
        stage: has more to say where the trainer is a stage's.
    """
    nccl = stage.nccl_environment(f"trainer-{rank}") if stage else {}
    return _common("cpu" if device == "cpu" else "gpu", visible) | {"OMP_NUM_THREADS": "1"} | nccl


# What has torch allocate GPU memory in segments that grow, which are handed over by another kind of handle.
EXPANDING: Variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def of_engine(stage: Stage, copy: int, eager: bool) -> Variables:
    """What an engine's process has in its environment. `copy` counts the engines of a stage that has several."""
    visible = stage.visible_to_engine(copy) if stage.kind == "gpu" else ""
    engines: Variables = {
        **_common(stage.kind, visible),
        **stage.nccl_environment(f"engine-{copy}"),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1" if stage.server else None,  # only then has `vllm serve` the paths for updates
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # The sampler compiles a helper for log-probabilities even in an eager engine: 15 s for nothing examined here.
        # On CPUs nothing is compiled: that takes a compiler, and minutes.
        "TORCHDYNAMO_DISABLE": "1" if eager or stage.kind == "cpu" else None,
    }
    if stage.kind == "gpu":
        # As vLLM itself has it for workers beside each other: threads of engines that start at once only wait in turn.
        return engines | {"OMP_NUM_THREADS": "1"}
    cores = sorted(os.sched_getaffinity(0))
    first = copy * stage.engine_ranks  # engines that are updated at once are not to wait for one core
    bound = "|".join(str(cores[(first + rank) % len(cores)]) for rank in range(stage.engine_ranks))
    return engines | {
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "OMP_NUM_THREADS": "1",
        # One process less to start; workers and what they compute are the same.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def of_spare_engine(stages: Iterable[Stage]) -> Variables:
    """What a process has that waits for an engine: the variables of an eager engine on the first stage with GPUs.

    Without GPUs there are none, which fit no engine: CPU engines leave no cores for a process that waits.
    """
    return next((of_engine(stage, 0, eager=True) for stage in stages if stage.kind == "gpu"), {})


def late_changes(had: Variables, wanted: Variables) -> Variables | None:
    """What a process that was started with `had` is still to be given, to have what one started with `wanted` has.

    None where a variable differs that is not READ_LATE.
    """
    here = {name: os.environ.get(name) for name in (*had, *wanted)}
    changes = {name: value for name, value in (here | wanted).items() if value != (here | had)[name]}
    return changes if all(name.startswith(READ_LATE) for name in changes) else None


def _common(kind: str, visible: str | None) -> Variables:
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": visible,
        "HF_HUB_OFFLINE": "1",
        "WEIGHT_UPDATE_TIMEOUT_S": str(UPDATE_TIMEOUT_S[kind]),
    }
