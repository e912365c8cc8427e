"""Settings of this process that whatever runs in it shares, and where its generators of random numbers stand."""

import gc
import hashlib
import os
import random
import signal
import socket

import torch


def settings() -> dict[str, str]:
    """Every setting in words, by a name for it: torch's, Python's, signal handlers and environment variables.

    Whether gradients are on is a thread's own: it is that of the thread that asks.
    """
    found = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "cuDNN's precision of float32": torch.backends.cudnn.allow_tf32,
        "the garbage collector": gc.isenabled(),
        "the timeout of sockets": socket.getdefaulttimeout(),
        "the working directory": os.getcwd(),
    }
    if torch.cuda.is_initialized():
        found["torch's GPU"] = torch.cuda.current_device()
    handlers = {f"the handler of {number.name}": signal.getsignal(number) for number in signal.valid_signals()
                if isinstance(number, signal.Signals)}  # fmt: skip
    variables = {f"the variable {name}": value for name, value in os.environ.items()}
    return {name: str(value) for name, value in {**found, **handlers, **variables}.items()}


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What has another value than before, a sentence for each."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name}: {before.get(name, 'unset')} became {now.get(name, 'unset')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def random_state(draw: bool) -> str:
    """A digest of the states of torch's and Python's generators. With `draw` each gives a number first.

    So a generator that is seeded again and again is told from one that nobody touches.
    """
    if draw:
        torch.rand(1)
        random.random()
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    digest.update(repr(random.getstate()).encode())
    if torch.cuda.is_initialized():
        if draw:
            torch.rand(1, device="cuda")
        digest.update(torch.cuda.get_rng_state().numpy().tobytes())
    return digest.hexdigest()
