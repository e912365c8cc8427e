"""Extensions of which no update ever succeeds: what they cost a run is what is tested with them."""

import threading

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import CLASSES


def hopeless(cls: type) -> type:
    """Have a class found by its name; no single requirement has to fail it."""
    CLASSES[cls.__name__] = cls
    return cls


@hopeless
class RaisesInEveryUpdate(WorkerExtension):
    """Raises at the first tensor that it should receive; the trainer is sending it."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        raise RuntimeError("this extension raises in every update")


@hopeless
class ReceivesNothing(WorkerExtension):
    """Returns without receiving, and says that all is well."""

    def begin_update(self, manifest: list[dict]) -> int:
        return len(manifest)

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        pass

    def end_update(self) -> int:
        return 0


@hopeless
class HangsInEveryUpdate(WorkerExtension):
    """Never comes back from its first tensor."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        threading.Event().wait()
