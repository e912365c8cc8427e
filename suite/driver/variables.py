"""The environment variables of the processes that engines and trainers run in."""

import os

from suite.stages import UPDATE_TIMEOUT_S, Stage


def of_trainer(device: str, visible: str | None, rank: int, stage: Stage | None) -> dict[str, str | None]:
    """What a rank of a trainer has in its environment.

    Args:
        device: "cpu" or "cuda".
        visible: its CUDA_VISIBLE_DEVICES; None for unset.
        stage: has more to say where the trainer is a stage's.
    """
    nccl = stage.nccl_environment(f"trainer-{rank}") if stage else {}
    return _common("cpu" if device == "cpu" else "gpu", visible) | {"OMP_NUM_THREADS": "1"} | nccl


def of_engine(stage: Stage, copy: int, eager: bool) -> dict[str, str | None]:
    """What an engine's process has in its environment. `copy` counts the engines of a stage that has several."""
    visible = stage.visible_to_engine(copy) if stage.kind == "gpu" else ""
    engines: dict[str, str | None] = {
        **_common(stage.kind, visible),
        **stage.nccl_environment(f"engine-{copy}"),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # The sampler compiles a helper for log-probabilities even in an eager engine: 15 s for nothing examined here.
        "TORCHDYNAMO_DISABLE": "1" if eager else None,
    }
    if stage.kind == "gpu":
        return engines
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(stage.tensor_parallel_size))
    return engines | {
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "OMP_NUM_THREADS": "1",
        # One process less to start; workers and what they compute are the same.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def _common(kind: str, visible: str | None) -> dict[str, str | None]:
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": visible,
        "HF_HUB_OFFLINE": "1",
        "WEIGHT_UPDATE_TIMEOUT_S": str(UPDATE_TIMEOUT_S[kind]),
    }
