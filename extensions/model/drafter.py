"""The draft model of an engine that guesses ahead, which vLLM keeps beside the model, with weights of its own.

An update may bring the tensors of the model, of the draft model, or of both. In a manifest those of the draft model
have DRAFT before the names of its checkpoint, as vLLM's own checksums name them.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from extensions.manifest import Announced, ManifestError
from extensions.model.load import Load, LoadError

DRAFT = "draft."
SHARED = (
    "the draft model shares {} with the model, so it cannot be updated by itself; nothing was touched. Until the engine"
    " is started anew, it drafts with its old weights"
)


@dataclass(frozen=True)
class Drafter:
    """A draft model.

    shared: a parameter that it shares with the model, as EAGLE's do; empty where all are its own.
    """

    model: torch.nn.Module
    shared: str
    _holder: object
    _of_engine: object

    @property
    def vllm_config(self) -> object:
        """The configuration that it was built with. vLLM makes it as it loads the model, and does not always keep it.

        Raises ManifestError where the draft model can't be updated by itself.
        """
        if self.shared:
            raise ManifestError(SHARED.format(self.shared))
        made = getattr(self._holder, "_draft_vllm_config", None)
        make = getattr(self._holder, "_create_draft_vllm_config", None)
        found = copy.copy(made or (make() if make else self._of_engine))
        found.model_config = self._of_engine.speculative_config.draft_model_config
        if made is None and make is None:
            found.quant_config = None
        return found


def drafter_of(model_runner: object, vllm_config: object) -> Drafter | None:
    """A worker's draft model; None where nothing with weights of its own guesses ahead, as with n-grams.

    One of vLLM's model runners keeps it in `drafter`, the other in `speculator`.
    """
    holder = getattr(model_runner, "drafter", None) or getattr(model_runner, "speculator", None)
    found = getattr(holder, "model", None)
    found = found.unwrap() if callable(getattr(found, "unwrap", None)) else found  # out of its CUDA graphs
    if not isinstance(found, torch.nn.Module):
        return None
    of_the_model = {id(parameter) for parameter in model_runner.get_model().parameters()}
    own = [name for name, parameter in found.named_parameters() if id(parameter) not in of_the_model]
    if not own:
        return None
    shared = next((name for name, parameter in found.named_parameters() if id(parameter) in of_the_model), "")
    return Drafter(found, shared, holder, vllm_config)


def parted(announced: Announced) -> tuple[Announced, Announced]:
    """What an update brings to the model, and to the draft model, by the names in its checkpoint."""
    of_model = {name: layout for name, layout in announced.items() if not name.startswith(DRAFT)}
    of_drafter = {_own(name): layout for name, layout in announced.items() if name.startswith(DRAFT)}
    return of_model, of_drafter


@contextmanager
def of_the_drafter() -> Iterator[None]:
    """Say in errors that they concern the draft model, since its tensors' names stand there without DRAFT."""
    try:
        yield
    except (ManifestError, LoadError) as error:
        raise type(error)(f"draft model: {error}") from error


class DraftLoad:
    """The load of an update that brings tensors of the draft model. It has the methods of `Load`.

    of_model: the load of the others; None where there are none.
    """

    def __init__(self, of_model: Load | None, of_drafter: Load) -> None:
        self._of_model, self._of_drafter = of_model, of_drafter
        self._loads = [load for load in (of_model, of_drafter) if load is not None]

    def begin(self) -> None:
        for load in self._loads:
            load.begin()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(DRAFT)}
        drafters = {_own(name): tensor for name, tensor in tensors.items() if name.startswith(DRAFT)}
        if others:
            self._of_model.load(others)
        if drafters:
            with of_the_drafter():
                self._of_drafter.load(drafters)

    def place(self, name: str) -> torch.Tensor | None:
        return self._of_drafter.place(_own(name)) if name.startswith(DRAFT) else self._of_model.place(name)

    def written_past(self, names: Iterable[str]) -> None:
        for load in self._loads:  # without a name too: something is being received into one of the models
            load.written_past([_own(name) for name in names if self._of(name) is load])

    def takes_pieces(self, name: str) -> bool:
        return self._of(name).takes_pieces(_own(name))

    def load_pieces(self, pieces: Iterable[tuple[str, int, torch.Tensor]]) -> None:
        given = [(self._of(name), (_own(name), start, piece)) for name, start, piece in pieces]
        for load in self._loads:
            load.load_pieces([piece for of, piece in given if of is load])

    def again(self) -> "DraftLoad | None":
        if any(load.again() is None for load in self._loads):
            return None
        return self

    def end(self) -> None:
        if self._of_model is not None:
            self._of_model.end()
        with of_the_drafter():
            self._of_drafter.end()

    def abort(self) -> bool:
        """Give both up. Returns True if both models compute with exactly the weights that they had before `begin`."""
        untouched = [load.abort() for load in self._loads]
        return all(untouched)

    def _of(self, name: str) -> Load:
        return self._of_drafter if name.startswith(DRAFT) else self._of_model


def _own(name: str) -> str:
    return name.removeprefix(DRAFT)
