"""Extensions of other projects, as they are released: nothing of theirs is changed, and nothing is copied.

A file of this folder that is named after a project has its adapter: how the extension is called in the workers, and
what sends in the trainer. docs/frameworks.md says with which vLLM each was tried, and what was found.
"""

from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, knows_no_drafts, no_beginning

if TYPE_CHECKING:
    import torch

PACKED = (
    "vLLM's CPU backend leaves parameters without elements or a loader where it has packed linear weights, and this"
    " extension's model.load_weights() raises on them; see docs/frameworks.md"
)


class AddressedEngine(EngineHalf):
    """Gives the workers what the trainer's ranks announce: {device id: address of a socket}."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        super().__init__(subject, engine)
        self.addresses: dict[str, str] = {}

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Put the addresses of all ranks together. Raises ValueError for what is malformed."""
        manifest, self.addresses = super().receive(announced), {}
        for announcement in announced:
            said = announcement["addresses"]
            texts = isinstance(said, dict) and all(isinstance(part, str) for pair in said.items() for part in pair)
            if not texts:
                raise ValueError(f"the trainer sent no {{device: address}}, but {said!r:.120}")
            self.addresses |= said
        return manifest


class Foreign(Subject):
    """An extension of another project.

    distribution, module: the package as it is installed, and as it is imported. version: the one that is examined.
    environment: the tox environment that has it.
    """

    distribution: ClassVar[str]
    version: ClassVar[str]
    environment: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ()  # no class is taken for one of these by --extension

    def missing(self) -> str:
        """Why it can't be examined in this environment at all; empty where it can."""
        try:
            metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return (
                f"expected {self.distribution} {self.version}, found no such package: run `tox run -e"
                f" {self.environment}`, or install it beside vLLM"
            )
        return ""


def lacks(name: str, **more: str) -> dict[str, str]:
    """What every extension of another project lacks; see Subject.lacks."""
    zeroed = f"{name} has no check_weights_changed(); update.repeated sends zeros too"
    return {"update.zeroed": zeroed} | no_beginning(name) | knows_no_drafts(name) | more


def no_adapters(why: str) -> dict[str, str]:
    """What a project lacks that starts its engines without LoRA adapters; see Subject.lacks."""
    return dict.fromkeys(("lora.exact", "lora.reloaded"), why)


class Counted:
    """Tensors on their way out, as they are; their bytes are counted."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.bytes_sent = tensors, 0

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        for name, tensor in self._tensors:
            self.bytes_sent += tensor.numel() * tensor.element_size()
            yield name, tensor
