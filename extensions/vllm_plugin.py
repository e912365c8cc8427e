"""vLLM calls this in each of its processes, through the entry point `weight_sync_planned`."""

BACKEND = "planned"


def register() -> None:
    """Make the backend `planned` known to vLLM, unless it is known or vLLM is older than 0.25."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
    except ImportError:  # a vLLM without weight transfer has to start all the same
        return
    starts_updates = hasattr(WeightTransferEngine, "start_weight_update")
    if starts_updates and BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "extensions.transfer", "PlannedTransferEngine")
