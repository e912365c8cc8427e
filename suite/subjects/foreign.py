"""Extensions of other projects, as they are released: nothing of theirs is changed, and nothing is copied.

A file of this folder that is named after a project has its adapter: how the extension is called in the workers, and
what sends in the trainer. docs/frameworks.md says with which vLLM each was tried, and what was found.
"""

from importlib import metadata
from typing import ClassVar

from suite.stages import Stage
from suite.subjects import handles
from suite.subjects.protocol import Subject, knows_no_drafts, no_beginning

PACKED = (
    "vLLM's CPU backend leaves parameters without elements or a loader where it has packed linear weights, and this"
    " extension's model.load_weights() raises on them; see docs/frameworks.md"
)

IN_PACKS = {"devices.missing_handle": "tensors travel in packs: none has a handle of its own"}


class Foreign(Subject):
    """An extension of another project.

    distribution: the package, as it is installed. version: the one that is examined.
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


def unfit_on_gpus(stage: Stage) -> str:
    """Why one that hands over what a GPU holds makes no sense on a stage of GPUs; empty where it does."""
    if stage.server:
        return f"{stage.name}: this adapter calls the engine in its own process, and a server is called over HTTP"
    return handles.unfit_on_gpus(stage)


def no_adapters(why: str) -> dict[str, str]:
    """What a project lacks that starts its engines without LoRA adapters; see Subject.lacks."""
    return dict.fromkeys(("lora.exact", "lora.reloaded"), why)
