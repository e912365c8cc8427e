"""What a mutant is, and the base classes of those that meddle with what is loaded."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from extensions.bracket import State, Update
from extensions.manifest import parse
from extensions.model.loading import new_load
from suite import stages
from suite.conformance.requirements import catalogue
from suite.stages import hardware
from suite.subjects import SUBJECTS, Subject, subject_from
from suite.subjects.registry import NAMED

PACKAGE = __package__
Loader = Callable[[str, torch.Tensor], None]
Named = Iterable[tuple[str, torch.Tensor]]
REFERENCES: dict[str, Subject] = SUBJECTS | NAMED  # of which mutants are broken versions

# Where it shows, by the kind of machine.
BROADCAST = {"cpu": "cpu-tp1", "gpu": "gpu-split"}
HANDLES = {"cpu": "cpu-tp1", "gpu": "gpu-colocate-tp1"}

# What a failure says, as patterns.
DIFFER = r"that differ"
NOT_THERE = rf"{DIFFER}|every weight to differ"  # from what it was before: the update has not come
ANSWERS = r"greedy tokens after|log-probabilities after"
ACCEPTED = r"an error for an update with .*found: success"


@dataclass(frozen=True)
class Mutant:
    """An extension broken on purpose.

    requirement: the one that it has to fail. says: a pattern that the failure's message has to have in it, so that
    nothing else is taken for it. thread: the real bug it stands for; where none is known, those of the requirement.
    cpu, gpu: the stage where it shows, on machines of this kind. case: part of the id of the cases to judge it by,
    where the requirement has several. gpus: how many those cases need, where that is more than their stage. patient: it
    makes somebody wait until a deadline is over. does: in a sentence.
    """

    name: str
    requirement: str
    says: str
    thread: str = ""
    cpu: str | None = None
    gpu: str | None = None
    case: str = ""
    patient: bool = False
    gpus: int = 1
    does: str = ""

    @property
    def extension(self) -> str:
        """As `--extension` takes it."""
        return f"{PACKAGE}:{self.name}"

    @property
    def host(self) -> str:
        """The reference subject that it is a broken version of, and that lends its engines."""
        kind = type(subject_from(self.extension))
        return next(name for name, subject in REFERENCES.items() if type(subject) is kind)

    @property
    def threads(self) -> tuple[str, ...]:
        """The real bugs that it stands for."""
        return (self.thread,) if self.thread else catalogue()[self.requirement].seen_in

    def stage(self, kind: str) -> str | None:
        """Where it is judged on machines of this kind; this one may have a single GPU."""
        if kind == "cpu":
            return self.cpu
        return "gpu-shared" if self.gpu in ("gpu-split", "gpu-fanout") and _one_gpu() else self.gpu

    def judged_by(self, kind: str, requirement: str, stage: str | None, case: str) -> bool:
        """Whether it is judged by a case; one without a stage is the same on all."""
        there = self.stage(kind) is not None and stage in (None, self.stage(kind))
        return there and requirement == self.requirement and self.case in case


@functools.cache
def _one_gpu() -> bool:
    return "gpu-shared" not in stages.unavailable(hardware.machine())


MUTANTS: dict[str, Mutant] = {}
CLASSES: dict[str, type] = {}


def mutant(requirement: str, says: str, thread: str = "", **where: str | bool | None) -> Callable[[type], type]:
    """Register a class; `where` are fields of Mutant: cpu, gpu, case, patient. Its docstring says what it does."""

    def register(cls: type) -> type:
        does = " ".join(cls.__doc__.split())
        MUTANTS[cls.__name__] = Mutant(cls.__name__, requirement, says, thread, does=does, **where)
        return named(cls)

    return register


def named(cls: type) -> type:
    """Have a class found by its name, which no other has. Raises ValueError."""
    if cls.__name__ in CLASSES:
        other = CLASSES[cls.__name__].__module__
        raise ValueError(f"{cls.__module__}: there is a {cls.__name__} in {other} already; give it another name")
    CLASSES[cls.__name__] = cls
    return cls


class Meddles:
    """Mixed into a reference extension: each tensor passes `_mutant_load` on its way from the checks into the model.

    State is kept in attributes `_mutant_...`, which the probe removes when the worker gets another extension.
    """

    _mutant_updates = 0  # begun so far, this one included

    def begin_update(self, manifest: list[dict]) -> int:
        count = super().begin_update(manifest)
        self._mutant_updates += 1
        loading = self._weight_sync_state.update.load
        load_all = loading.load

        def load_each(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                self._mutant_load(lambda name, tensor: load_all({name: tensor}), name, tensor)

        loading.load, loading.unwritten = load_each, list  # what it leaves out is to be seen in the weights
        return count

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        load(name, tensor)

    def _mutant_before(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """What the update before this one brought under this name; None in the first."""
        received = self.__dict__.setdefault("_mutant_received", {})
        before, received[name] = received.get(name), tensor.clone()
        return before


class Unchecked:
    """Mixed into a reference extension: an update begins whatever it announces."""

    def begin_update(self, manifest: list[dict]) -> int:
        update = Update(new_load(self.model_runner.get_model(), self.vllm_config), parse(manifest))
        self._weight_sync_state = State(update, self._weight_sync_state.inconsistent)
        update.load.together, update.load.unwritten = False, list
        update.load.begin()
        return len(manifest)
