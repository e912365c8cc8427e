"""What selftests give to adapters of other projects' extensions: an update's tensors, and an engine."""

from typing import Any

import torch

TENSORS = [("a.weight", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)), ("b.weight", torch.ones(4))]
DEVICE = "GPU-0000"
MANIFEST = [{"name": "a.weight", "dtype": "bfloat16", "shape": [2, 3]}]


class Sent:
    """Tensors of an update, as a subject's half gets them."""

    def __iter__(self):
        return iter(TENSORS)

    def held(self) -> list[tuple[str, torch.Tensor]]:
        return TENSORS


class Engine:
    """Keeps what is called in its workers."""

    takes_adapters = False

    def __init__(self, device: str = "cuda:0") -> None:
        self.devices = [{"rank": 0, "id": DEVICE, "device": device}]
        self.called: list[tuple] = []
        self.answers: list[Any] = [None]

    def rpc(self, method: str, *args: Any) -> list[Any]:
        self.called.append((method, *args))
        return self.answers
