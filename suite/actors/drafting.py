"""An engine that guesses ahead with a draft model: how it starts, and how many of its guesses it accepts.

The draft model is a copy of the model, so a cold engine accepts every guess, and an engine whose draft model has other
weights hardly any.
"""

from typing import Any

GUESSES = "guesses"  # the suite's own among an engine's options: how many tokens are guessed at a time
COUNTERS = {"guessed": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def arguments_of(options: dict[str, Any], model: str, tensor_parallel_size: int) -> dict[str, Any]:
    """Arguments of vllm.LLM for an engine's options, where GUESSES stands for a draft model: `model` once more."""
    if GUESSES not in options:
        return options
    others = {name: value for name, value in options.items() if name != GUESSES}
    guessing = {
        "method": "draft_model",
        "model": model,
        "num_speculative_tokens": options[GUESSES],
        "draft_tensor_parallel_size": tensor_parallel_size,
    }
    return others | {"speculative_config": guessing, "disable_log_stats": False}


def counted(llm: Any) -> dict[str, int]:
    """How many tokens a vllm.LLM has guessed since it started, and how many of those it has accepted."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS.values()}
    return {what: int(found[name]) for what, name in COUNTERS.items()}
