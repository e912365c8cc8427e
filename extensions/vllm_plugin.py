"""What vLLM calls in each of its processes by way of the entry point `weight_sync_planned`."""

BACKEND = "planned"


def register() -> None:
    """Make the backend `planned` known to vLLM's weight transfer, unless it is, or vLLM is older than 0.25."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
    except ImportError:  # a vLLM without weight transfer, which has to start as it does without this package
        return
    starts_updates = hasattr(WeightTransferEngine, "start_weight_update")
    if starts_updates and BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "extensions.transfer", "PlannedTransferEngine")
