"""What tests expect of an engine after an update: its weights, and what it answers."""

from collections.abc import Sequence

from reports.units import counted
from suite.actors import answers
from suite.driver.expected import expect, expect_told
from suite.driver.together import MAX_TOKENS, Together
from suite.processes.call import gather

# Two right computations in bfloat16 differ in a log-probability by less than this, and choose the same token where the
# best logit leads by more than twice that. Measured on the tiny models: see suite/selftest/test_trainer.py.
LOGPROB_TOLERANCE = 0.35
CLEAR_GAP = 2 * LOGPROB_TOLERANCE
MIN_CLEAR_TOKENS = 24


class Expecting(Together):
    """Compares what the engines compute with to what it should be."""

    def compared(self, seed: int) -> list[dict]:
        """Every engine rank compared with that of an engine of its stage, cold-loaded from the checkpoint of `seed`."""
        results = []
        for engine in self.engines:
            path = self.pool.oracle(engine.key, seed)
            results += self._call(engine, "probe_compare", path, [path], path)
        return results

    def snapshot(self) -> str:
        """Have all ranks write what they compute with now; returns where."""
        path = str(self.pool.scratch())
        for index, engine in enumerate(self.engines):
            self._call(engine, "probe_save", f"{path}-{index}")
        return path

    def steady_addresses(self) -> list[list[dict[str, int]]]:
        """`{path: address}` by engine and rank, of every tensor that an answer leaves where it was.

        Those are what a captured graph may read. What moves by itself, a graph cannot.
        """
        self.generate(self.prompts())
        before = self.call_engines("probe_addresses")
        self.generate(self.prompts())
        after = self.call_engines("probe_addresses")
        return [
            [dict(one.items() & other.items()) for one, other in zip(*ranks, strict=True)]
            for ranks in zip(before, after, strict=True)
        ]

    def expect_at(self, addresses: list[list[dict[str, int]]]) -> None:
        """Every tensor is at its address, and there are some."""
        for engine, expected, found in zip(self.engines, addresses, self.call_engines("probe_addresses"), strict=True):
            for rank, (steady, now) in enumerate(zip(expected, found, strict=True)):
                moved = sorted(path for path, address in steady.items() if now.get(path) != address)
                some = f"{len(moved)} of {len(steady)} moved on rank {rank} of {engine.key}: {moved[:5]}"
                expect_told(steady, f"tensors of rank {rank} that stay where they are", self.where)
                expect(not moved, "every tensor at its address", some, self.where)

    def says_inconsistent(self) -> bool:
        """Whether the extension says of itself, by `update_state()`, that its weights are not to be used."""
        return all("inconsistent" in states for states in self.half("state"))

    def expect_consistent(self) -> None:
        """After a whole update the extension does not say that its weights are inconsistent."""
        states = self.half("state")
        says = "update_state() not to say inconsistent after a whole update"
        expect(not any("inconsistent" in of_ranks for of_ranks in states), says, states, self.where)

    def checker(self, **asked: object) -> dict | None:
        """What the /weight_checker of a server answers, see `ServerEngine.check_weights`. For one engine."""
        return self.engines[0].process.call("check_weights", deadline_s=self.call_deadline_s, **asked)

    def differing_from_zero(self) -> int:
        """How many weights have an element that is not zero."""
        return sum(result["differing"] for ranks in self.call_engines("probe_zero") for result in ranks)

    def expect_exact(self, seed: int) -> None:
        """Every tensor that a rank computes with is bit-equal to the cold-loaded engine's: weights, and all others."""
        self._expect_none(self.compared(seed), f"the weights of an engine cold-loaded from checkpoint {seed}")

    def expect_cold_answers(self, seed: int) -> None:
        """Tokens and log-probabilities are, bit by bit, those of the engine cold-loaded from the checkpoint of `seed`.

        Where they are not, a second cold engine answers too: what lies between the answers of both is the tolerance.
        """
        for engine in self.engines:
            cold = answers.read([self.pool.oracle(engine.key, seed)])
            found = engine.process.call("answers", deadline_s=self.call_deadline_s)
            if answers.differing(found, cold):
                cold = answers.read([self.pool.oracle(engine.key, seed, again) for again in (False, True)])
            if not cold.is_exact:
                self.pool.tolerate(engine.key, cold.how_far)
            self._expect_alike(found, cold, f"the answers of an engine cold-loaded from checkpoint {seed}")

    def expect_own_answers(self) -> None:
        """Tokens and log-probabilities are, bit by bit, those that the engine gave before any update."""
        for engine in self.engines:
            cold = answers.cold(engine.process.call("cold_answers", deadline_s=self.call_deadline_s))
            found = engine.process.call("answers", deadline_s=self.call_deadline_s)
            self._expect_alike(found, cold, "the answers from before any update")

    def expect_zero(self) -> None:
        """Every effective weight element of every rank is zero, and there are some."""
        results = [result for ranks in self.call_engines("probe_zero") for result in ranks]
        some = sum(result["elements"] for result in results)
        expect(some > 0, "weights that are zero", "no element of any weight", self.where)
        self._expect_none(results, "zero in every element")

    def expect_all_different(self, seed: int) -> None:
        """Not one weight is the checkpoint's yet: else finding it there after an update would prove nothing.

        Weights that cold engines of this checkpoint and of the engines' own have in common are left out. A rank may
        have no others. Raises RuntimeError where none has.
        """
        for engine in self.engines:
            paths = [self.pool.oracle(engine.key, one) for one in (seed, self.seed)]
            results = self._call(engine, "probe_alike", *paths)
            differing = f"weights in which checkpoints {seed} and {self.seed} differ"
            expect_told(sum(result["weights"] for result in results), differing, self.where)
            for result in results:
                rank, same = result["rank"], result["same"]
                found = f"{same} equal on rank {rank}: {', '.join(result['first'])}"
                expect(same == 0, f"every weight to differ from checkpoint {seed}", found, self.where)

    def expect_equal_to(self, snapshot: str, what: str, in_common: Sequence[int] = ()) -> None:
        """Every tensor that a rank computes with is bit-equal to a snapshot of the same engines.

        A snapshot may hold weights alone. Then all others are compared with what cold engines of the checkpoints
        `in_common` have in common.
        """
        results = []
        for index, engine in enumerate(self.engines):
            path, unsteady = f"{snapshot}-{index}", self.pool.oracle(engine.key, self.seed)
            beside = [self.pool.oracle(engine.key, seed) for seed in in_common] or [path]
            results += self._call(engine, "probe_compare", path, beside, unsteady)
        self._expect_none(results, what)

    def expect_moved_from(self, seed: int) -> None:
        """Hardly a weight is the checkpoint's any more, and none is zero."""
        for result in self.compared(seed):
            same = result["weights"] - result["differing"]
            found = f"{same} of {result['weights']} as before"
            expect(same == 0, f"every weight to have moved from checkpoint {seed}", found, self.where)

    def expect_sent(self) -> None:
        """Every element of every tensor that the trainer holds is where the engine computes with it.

        Told by positional checksums, which take no second copy of the model. For engines of one rank.
        """
        calls = [engine.process.submit("rpc", "probe_checksums", self.manifest) for engine in self.engines]
        expected = self.trainer.call("checksums")[0]
        for engine, (found,) in zip(self.engines, gather(calls, self.call_deadline_s), strict=True):
            wrong = [name for name, number in expected.items() if found.get(name) != number]
            some = f"{len(wrong)} of {len(expected)} others in {engine.key}: {wrong[:5]}"
            expect_told(expected, "tensors that the trainer holds", self.where)
            expect(not wrong, "the positional checksum of every tensor to be the trainer's", some, self.where)

    def negated(self) -> list[list[dict[str, int]]]:
        """By engine and rank, `{weight: checksum}` that its weights would have with the opposite sign."""
        return self.call_engines("probe_weight_checksums", True)

    def expect_negated(self, before: list[list[dict[str, int]]]) -> None:
        """Every weight has the opposite sign of that from which `negated` took `before`, in every element.

        For models whose kernels may keep weights in a layout of their own: no checksum of what was sent is theirs.
        """
        found = self.call_engines("probe_weight_checksums", False)
        for engine, *sides in zip(self.engines, before, found, strict=True):
            for rank, (expected, now) in enumerate(zip(*sides, strict=True)):
                wrong = [name for name, number in expected.items() if now.get(name) != number]
                some = f"{len(wrong)} of {len(expected)} others on rank {rank} of {engine.key}: {wrong[:5]}"
                expect_told(expected, f"weights on rank {rank}", self.where)
                expect(not wrong, "every weight to be the one before with the other sign", some, self.where)

    def expect_reported_zero(self, expected: bool) -> None:
        """The extension's own check_weights_changed() says on every rank whether all weights are zero."""
        for engine, found in zip(self.engines, self.call_engines("check_weights_changed"), strict=True):
            says = f"check_weights_changed() to say {expected} on every rank"
            expect(found == [expected] * engine.ranks, says, found, self.where)

    def expect_not_reported_zero(self) -> None:
        """The extension's own check_weights_changed() says on a rank at least that not all weights are zero."""
        for found in self.call_engines("check_weights_changed"):
            says = "check_weights_changed() to say False where one element is not zero"
            expect(False in found, says, found, self.where)

    def expect_same_behaviour(self, prompts: list[list[int]] | None = None) -> None:
        """Greedy tokens and log-probabilities are those of the trainer's own forward pass.

        Of a model that the trainer does not compute with, they are those of an engine cold-loaded from the checkpoint
        that the trainer holds.
        """
        if not self.spec.computed:
            self.expect_cold_answers(self.held)
            return
        prompts = prompts or self.prompts()
        self.expect_answers(prompts, self.trainer.call("greedy", prompts, MAX_TOKENS)[0])

    def expect_same_answers(self, before: list[list[dict]], what: str) -> None:
        """The engines answer as they did before `what`."""
        found = self.generate(self.prompts())
        differing = sum(
            a != b for one, other in zip(before, found, strict=True) for a, b in zip(one, other, strict=True)
        )
        expect(found == before, f"the answers from before {what}", f"{differing} others", self.where)

    def expect_answers(self, prompts: list[list[int]], oracle: list[dict]) -> None:
        """Greedy tokens and log-probabilities are those of an oracle, as `oracles.greedy` gives them.

        A prompt is followed up to the first token whose lead is so small that another right computation may choose
        otherwise. Raises RuntimeError where that leaves too little to tell anything.
        """
        for said in self.generate(prompts):
            self.expect_said(prompts, oracle, said)

    def expect_said(
        self, prompts: list[list[int]], oracle: list[dict], said: list[dict], least: int = MIN_CLEAR_TOKENS
    ) -> None:
        """As `expect_answers`, of what an engine has said already; there may be more of it than the oracle gives.

        least: how many tokens have to be clear-cut to tell anything.
        """
        clear = [next((i for i, gap in enumerate(a["gaps"]) if gap <= CLEAR_GAP), MAX_TOKENS) for a in oracle]
        if sum(clear) < least:
            raise RuntimeError(f"only {sum(clear)} tokens of {len(prompts)} prompts are clear-cut {self.where}")
        for prompt, expected, found, count in zip(prompts, oracle, said, clear, strict=True):
            self._expect_answer(expected, found, prompt, count)

    def _expect_answer(self, expected: dict, found: dict, prompt: list[int], count: int) -> None:
        tokens, reference = found["tokens"][:count], expected["tokens"][:count]
        expect(tokens == reference, f"greedy tokens after {prompt}: the trainer's {reference}", tokens, self.where)
        pairs = zip(found["logprobs"][:count], expected["logprobs"][:count], strict=True)
        apart = max((abs(a - b) for a, b in pairs), default=0.0)
        within = f"log-probabilities after {prompt}: the trainer's within {LOGPROB_TOLERANCE}"
        expect(apart <= LOGPROB_TOLERANCE, within, f"{apart:.3f} apart", self.where)

    def _expect_alike(self, found: list[dict], cold: answers.Cold, whose: str) -> None:
        differing = answers.differing(found, cold)
        some = f"{len(differing)} other answers: {'; '.join(differing)}"
        expect(not differing, f"{whose}, within {cold.apart:.3g}", some, self.where)

    def _expect_none(self, results: list[dict], expected: str) -> None:
        looked_at = sum(result["elements"] + result["differing"] for result in results)
        expect_told(looked_at, "weights in an engine or in the one to compare with", self.where)
        for result in results:
            rank, differing, others = result["rank"], result["differing"], result.get("others", 0)
            which = counted(differing, "weight") + (f" and {counted(others, 'other tensor')}" if others else "")
            differ = "differs" if differing + others == 1 else "differ"
            found = f"{which} that {differ} on rank {rank}: {'; '.join(result['first'])}"
            expect(differing == others == 0, expected, found, self.where)
