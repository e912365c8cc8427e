"""Engines that guess ahead with a draft model: updates of it, and what is expected of it. For one engine."""

from dataclasses import dataclass

from suite import models
from suite.actors.drafting import GUESSES
from suite.driver.expected import expect
from suite.driver.expecting import Expecting
from suite.driver.moving import Moved, Moving

GUESSING_TOKENS = 24  # that each prompt is answered with, so that there are guesses to count
GUESSING_PROMPTS = 4
MIN_ACCEPTED = 0.8  # of a draft model that equals the model; rounding makes the two differ now and then


@dataclass(frozen=True)
class Guesses:
    """How many tokens a draft model has guessed, and how many of them were what the model says."""

    guessed: int
    accepted: int

    @property
    def are_accepted(self) -> bool:
        """Whether they are accepted as those of a draft model are that equals the model."""
        return self.accepted >= MIN_ACCEPTED * self.guessed

    def __str__(self) -> str:
        return f"{self.accepted} of {self.guessed} guesses"


class Drafting(Moving, Expecting):
    """Updates of the draft model, which is a copy of the model."""

    @property
    def drafts(self) -> bool:
        """Whether the engine has a draft model."""
        return GUESSES in dict(self.engines[0].key.options)

    def update_drafter(self) -> Moved:
        """One update that brings the tensors of the draft model alone: those that the trainer holds."""
        prefix = self.subject.draft_prefix()
        return self.update(alter={"rename": {name: f"{prefix}{name}" for name, _ in models.tensors(self.spec)}})

    def guesses(self) -> Guesses:
        """How many tokens the engine guesses for some prompts, and how many of those it accepts."""
        before = self._counted()
        self.reset_cache()
        self.generate(self.prompts(GUESSING_PROMPTS), GUESSING_TOKENS)
        after = self._counted()
        return Guesses(*(after[what] - before[what] for what in ("guessed", "accepted")))

    def expect_guesses_accepted(self) -> None:
        """The draft model guesses, and the model would have said the same."""
        found = self.guesses()
        accepted = found.guessed > 0 and found.are_accepted
        expect(accepted, f"at least {MIN_ACCEPTED:.0%} of the draft model's guesses accepted", found, self.where)

    def expect_drafter(self, seed: int) -> None:
        """Every weight of the draft model is, bit by bit, the model's of an engine cold-loaded from `seed`."""
        (engine,) = self.engines
        found = self._call(engine, "probe_drafter", self.pool.oracle(engine.key, seed))
        self._expect_none(found, f"the draft model's weights of an engine cold-loaded from checkpoint {seed}")

    def _counted(self) -> dict[str, int]:
        return self.engines[0].process.call("guesses", deadline_s=self.call_deadline_s)
