"""Extensions of which no update ever succeeds: what they cost a run is what is tested with them.

The third of them, which receives nothing and says that all is well, is a mutant: `values.ReceivesNothing`.
No single requirement has to fail these.
"""

import threading

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import named


@named
class RaisesInEveryUpdate(WorkerExtension):
    """Raises at the first tensor that it should receive; the trainer is sending it."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        raise RuntimeError("this extension raises in every update")


@named
class HangsInEveryUpdate(WorkerExtension):
    """Never comes back from its first tensor."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        threading.Event().wait()
