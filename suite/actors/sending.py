"""The trainer's half of every update, beside whatever trains. What is sent how is the subject's."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from extensions.manifest import manifest_of
from suite.actors import link
from suite.actors.attending import send_attended
from suite.actors.dialogue import CALLED_OFF, NotStarted, Refused, TrainerSide
from suite.processes.blame import of_the_suite
from suite.subjects import Subject, from_plain
from suite.subjects.protocol import TrainerHalf

GATHER = "gather the tensors of an update"
Named = Iterator[tuple[str, torch.Tensor]]


class Trains(Protocol):
    """A rank of what trains. The methods are those of suite.actors.trainer.Trainer."""

    rank: int
    world_size: int
    device: torch.device

    def named_tensors(self, order: str, alter: dict[str, Any] | None) -> Named:
        """Whole tensors by name; all ranks gather them together."""

    def manifest(self, order: str, alter: dict[str, Any] | None) -> list[dict]:
        """What announces these tensors; nothing is gathered."""


class Fault:
    """What a test has happen to this process, or to another, in an update.

    Args:
        asked: {"moment": "before" | "during" | "after" the transfer, "signal": "KILL" or "STOP"} and the "pid" that is
            struck, where that is not this process; None for nothing.
    """

    def __init__(self, asked: dict | None) -> None:
        self._asked = asked

    def strike(self, moment: str) -> None:
        """Strike, if this is the moment."""
        if self._asked and self._asked["moment"] == moment:
            number = signal.Signals[f"SIG{self._asked['signal']}"]
            os.kill(self._asked.get("pid", os.getpid()), number)


class Outgoing:
    """The tensors of one update, as a subject's half gets them."""

    def __init__(self, trainer: Trains, order: str, alter: dict | None, fault: Fault) -> None:
        self._trainer, self._how, self._fault = trainer, (order, alter), fault
        self._held: list[tuple[str, torch.Tensor]] = []
        self._gathering: Named | None = None
        self.count = 0

    def held(self) -> list[tuple[str, torch.Tensor]]:
        """All of them at once, from now on."""
        with of_the_suite(GATHER):
            self._held = self._held or list(self._trainer.named_tensors(*self._how))
        self.count = len(self._held)
        return self._held

    def manifest(self) -> list[dict]:
        """[{"name", "dtype", "shape"}, ...], in the order of sending."""
        with of_the_suite(GATHER):
            manifest = manifest_of(self._held) if self._held else self._trainer.manifest(*self._how)
        self.count = len(manifest)
        return manifest

    def gather(self) -> None:
        """Take part in gathering what has not been gathered: all ranks do, whoever sends, and however that ends."""
        for _ in self._gathered():
            pass

    def __iter__(self) -> Named:
        """One after the other; a fault may strike half way."""
        with of_the_suite(GATHER):
            for index, named in enumerate(self._held or self._gathered()):
                if index == self.count // 2:
                    self._fault.strike("during")
                yield named

    def _gathered(self) -> Named:
        if self._gathering is None:
            self._gathering = iter(self._trainer.named_tensors(*self._how))
        return self._gathering


class Sending:
    """One rank's half of updates. Several engines may be fed at once."""

    def __init__(self, trainer: Trains) -> None:
        self._trainer = trainer
        self._subject: Subject | None = None
        self._half: TrainerHalf | None = None
        self._links: tuple[link.Link, ...] = ()

    def connect(self, subject: dict, link_paths: list[str], deadline_s: float) -> None:
        """Be a rank of this subject, and let go of earlier engines. A rank that speaks gets a line to each engine.

        `subject` is `Subject.plain()`, `link_paths` where the engines listen.
        """
        self.close()
        self._subject = from_plain(subject)
        self._half = self._subject.trainer_half(self._trainer)
        if self._speaks:
            self._links = tuple(link.connect(path, deadline_s) for path in link_paths)

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Meet the engines, in whatever way the subject does."""
        if self._speaks:
            self._half.invite(address, port, world_size)

    def update(
        self,
        deadline_s: float,
        order: str = "checkpoint",
        alter: dict | None = None,
        relabel: str | None = None,
        withhold: str | None = None,
        fault: dict | None = None,
        call_off: bool = False,
    ) -> dict:
        """This rank's half of one update. Returns when it started, announced and ended (monotonic clock), what was
        sent, and for how many seconds the subject prepared what it announced.

        `order` and `alter` are those of `named_tensors`. `relabel` names the device of the handles falsely; where it
        is empty there are none. `withhold` names the tensor that has no handle. `fault` is that of `Fault`. `call_off`
        ends the update when all engines have begun it.
        Raises Refused where an engine refuses, and where it is called off. What else it raises, engines are told.
        """
        started, striking = time.monotonic(), Fault(fault)
        tensors, said = Outgoing(self._trainer, order, alter, striking), TrainerSide(self._links, deadline_s)
        try:
            announcement, announce_s = self._announcement(tensors, said, relabel, withhold)
            announced = time.monotonic()
            self._agree(said, striking, announcement, call_off)
            sent = self._send(tensors, said, striking)
        except Refused:
            self._half.release()
            raise
        except Exception as error:  # an engine may still read what was handed over
            said.failed(error)
            raise
        self._half.release()
        measured = {"bytes_sent": sent, "tensors": tensors.count, "announce_s": announce_s, "announced_s": announced}
        return {"started_s": started, "ended_s": time.monotonic(), **measured}

    def forget(self) -> None:
        """Let go of whatever keeps tensors. What the sender raises goes to the log."""
        try:
            if self._half is not None:
                self._half.forget()
        except Exception as error:
            print(f"a sender could not release what it held: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Hang up, and let go of what was handed over and of whom it went to.

        What a sender raises that is closed goes to the log: it must not spoil what the next subject sends.
        """
        half, links = self._half, self._links
        self._half, self._links = None, ()
        for old in links:
            old.close()
        try:
            if half is not None:
                half.close()
        except Exception as error:
            print(f"a sender could not be closed: {type(error).__name__}: {error}")

    @property
    def _speaks(self) -> bool:
        return self._trainer.rank < self._subject.speakers(self._trainer.world_size)

    @property
    def _all_speak(self) -> bool:
        return self._subject.speakers(self._trainer.world_size) == self._trainer.world_size

    def _announcement(
        self, tensors: Outgoing, said: TrainerSide, relabel: str | None, withhold: str | None
    ) -> tuple[dict[str, Any], float]:
        """What is announced, and the seconds in which the subject prepared it."""
        if self._speaks:
            self._half.gather(tensors)
        said.begin()
        began = time.monotonic()
        announced = self._half.announce(tensors) if self._speaks else {}
        announce_s = time.monotonic() - began
        announced = self._half.mislabelled(announced, relabel) if relabel is not None else announced
        announced = self._half.withheld(announced, withhold) if withhold is not None else announced
        return announced if "manifest" in announced else {"manifest": tensors.manifest(), **announced}, announce_s

    def _agree(self, said: TrainerSide, fault: Fault, announcement: dict[str, Any], call_off: bool) -> None:
        """Announce the update, and have all engines start it and all ranks send it, or none. Raises NotStarted."""
        refusals = said.announce(announcement)
        if call_off and said.lines and not refusals:
            refusals.append(CALLED_OFF)
        fault.strike("before")
        said.decide(go=not refusals)
        if not self._all_agree(not refusals):
            raise NotStarted("; ".join(refusals) or "an engine refused another rank's update")

    def _send(self, tensors: Outgoing, said: TrainerSide, fault: Fault) -> int:
        if not self._speaks:
            tensors.gather()
            return 0
        try:
            return send_attended(self._half, tensors, said, lambda: fault.strike("after"))
        except Exception:
            if not self._all_speak:
                tensors.gather()  # the other ranks are in the middle of it, and can't be told
            raise

    def _all_agree(self, go: bool) -> bool:
        """Rank 0's decision, on the ranks that hear no engine themselves."""
        if self._all_speak:
            return go
        decision = torch.tensor([int(go)], device=self._trainer.device)
        torch.distributed.broadcast(decision, src=0)
        return bool(decision.item())
