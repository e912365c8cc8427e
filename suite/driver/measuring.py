"""Measurements beside those of an update's own time: what the hardware takes, peak memory, tokens per second."""

from collections.abc import Callable

from suite.driver.moving import Moved, Moving
from suite.driver.parts import parts_of
from suite.processes.call import gather

# Requests in flight: few and short, since they are computed anew after an update, whatever has moved the weights.
REQUESTS, PROMPT_TOKENS, TOKENS_BEFORE, TOKENS_ASKED = 2, 4, 8, 400
TIMES = "update_times"  # the method by which an extension says when the parts of its last update were over


class Measuring(Moving):
    """Measures a trainer and its engines: all of them where time is taken, the first where it is memory or tokens."""

    def renew(self) -> None:
        """Have an update bring all weights anew, where the subject sends only what has changed."""
        if self.subject.compares:
            self.trainer.negate()

    def parts(self, moved: Moved) -> dict[str, float]:
        """Seconds of each part of the last update, see `suite.driver.parts`; nothing of several engines."""
        if not moved.over_s:
            return {}
        return parts_of(moved.over_s, self._call(self.engines[0], TIMES) if self.subject.can(TIMES) else [])

    def roofline(self, nbytes: int, samples: int) -> tuple[str, list[float]]:
        """What this run's hardware takes to move `nbytes` once: (how, seconds of every sample).

        The subject says which: one broadcast of one tensor in a group like the update's, or one copy on the engine's
        device, on all ranks at once, of which the slowest counts.
        """
        measured = {"broadcast": self._broadcast_roofline, "copy": self._copy_roofline}[self.subject.roofline]
        return measured(nbytes, samples)

    def _broadcast_roofline(self, nbytes: int, samples: int) -> tuple[str, list[float]]:
        self._join_roofline()
        kind = "NCCL broadcast" if self.stage.kind == "gpu" else "gloo broadcast"
        return kind, self._broadcasts(nbytes, samples)

    def _copy_roofline(self, nbytes: int, samples: int) -> tuple[str, list[float]]:
        copies = [self._call(self.engines[0], "probe_copy", nbytes) for _ in range(samples + 1)][1:]
        self._call(self.engines[0], "probe_forget")
        return "device copy" if self.stage.kind == "gpu" else "memory copy", [max(ranks) for ranks in copies]

    def _join_roofline(self) -> None:
        address, port, world_size = self.pool.launcher.address, self.pool.launcher.free_port(), self.group_size
        calls = [self.trainer.processes[0].submit("join_roofline", address, port, world_size)]
        for engine, offset in self.offsets():
            calls.append(engine.process.submit("rpc", "probe_join", address, port, offset, world_size))
        gather(calls, self.call_deadline_s)

    def _broadcasts(self, nbytes: int, samples: int) -> list[float]:
        """Each sample from the earliest start to the latest end; the first, which allocates, is left out."""
        seconds = []
        for _ in range(samples + 1):
            calls = [self.trainer.processes[0].submit("send_roofline", nbytes)]
            calls += [engine.process.submit("receive", nbytes) for engine in self.engines]
            halves = gather(calls, self.call_deadline_s)
            seconds.append(max(half["ended_s"] for half in halves) - min(half["started_s"] for half in halves))
        self.call_engines("probe_forget")
        return seconds[1:]

    def peak_memory(self, change: Callable[[], object] | None = None) -> tuple[int, int]:
        """Bytes that engine and trainer take at the most above what they had before one update, over all ranks.

        `change` changes what is to be sent, in the place of `renew`.
        """
        (change or self.renew)()
        engine = self.engines[0]
        self._call(engine, "probe_memory_mark")
        self.trainer.call("memory_mark")
        self.update()
        peaks = self._call(engine, "probe_memory_peak")
        return sum(peaks), sum(self.trainer.call("memory_peak"))

    def with_requests(self, updates: int, change: Callable[[], object] | None = None) -> list[Moved]:
        """Updates with requests in flight, for which generation is paused and after which it goes on at once.

        They are started anew for each update. Their prefixes are cached nowhere afterwards. `change` is that of
        `peak_memory`.
        """
        prompts = self.prompts(REQUESTS, PROMPT_TOKENS)
        moved = []
        for _ in range(updates):
            (change or self.renew)()
            self.connect()
            paused = (prompts, TOKENS_ASKED, TOKENS_BEFORE)
            self.engines[0].process.call("pause", *paused, deadline_s=self.call_deadline_s)
            moved.append(self.update(paused=True))
        return moved

    def tokens_per_s(self, max_tokens: int, warm_ups: int = 1) -> float:
        """Generated tokens per second of the first engine, of a batch of prompts that it has seen `warm_ups` times."""
        engine, prompts = self.engines[0].process, self.prompts()
        for _ in range(1 + warm_ups):
            rate = engine.call("tokens_per_s", prompts, max_tokens, deadline_s=self.call_deadline_s)
        return rate
