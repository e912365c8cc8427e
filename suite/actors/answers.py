"""What engines are asked to see that they answer alike: prompts, what a cold engine said, and how another differs.

An engine that computes with the right tensors may still use wrong ones somewhere. So its answers are compared with a
cold-loaded engine's: greedy tokens, and their log-probabilities to the last bit. The prompts reach from a few tokens to
the engine's longest position, since what is wrong in a table shows at the positions that look it up.

A cold engine answers twice. Where another does not answer alike, a second cold engine is started, and answers too: each
process may choose other kernels, as Triton's autotuning does. The tolerance is how far cold engines are from each
other. An engine that compiles kernels for itself is compared with its own answers from before the first update.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.actors.written import write_whole
from suite.models import pictures

LENGTHS = (12, 100, 300)  # and the longest that leaves room for the answer
TOKENS = 6  # of an answer


@dataclass(frozen=True)
class Cold:
    """What cold engines answered.

    answers: {"tokens": [...], "logprobs": [...]} by prompt, the first time. apart: how far log-probabilities of the
    same token were from that at other times. steady: by prompt, the leading tokens that were the same every time.
    """

    answers: list[dict]
    apart: float
    steady: list[int]

    @property
    def is_exact(self) -> bool:
        """Whether all answers were the same, bit by bit."""
        return self.apart == 0 and all(
            count == len(answer["tokens"]) for count, answer in zip(self.steady, self.answers, strict=True)
        )

    @property
    def how_far(self) -> str:
        """How far the answers were apart, in words."""
        return f"log-probabilities {self.apart:.3g} apart, {min(self.steady)} leading tokens the same"


def prompts(vocabulary: int, longest: int) -> list[list[int]]:
    """Prompts of LENGTHS and of the longest that an engine of `longest` positions can go on from; the same always."""
    lengths = [length for length in LENGTHS if length + TOKENS < longest] + [longest - TOKENS]
    draw = random.Random(longest)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


def pictured(config: Any) -> list[dict]:
    """A prompt with a picture, as `vllm.LLM.generate` takes it, where the model is one of the suite's that see.

    A user's model is asked about text alone: how it takes pictures is not known.
    """
    if config.hf_config.model_type != pictures.ARCHITECTURE:
        return []
    from PIL import Image

    draw = random.Random(pictures.EDGE)
    tokens = [draw.randrange(config.get_vocab_size() - 1) for _ in range(LENGTHS[0])]  # the picture comes before them
    picture = Image.frombytes("RGB", (pictures.EDGE, pictures.EDGE), draw.randbytes(3 * pictures.EDGE**2))
    return [{"prompt_token_ids": tokens, "multi_modal_data": {"image": picture}}]


def write(path: str, first: list[dict], second: list[dict]) -> None:
    """Write what a cold engine answered, both times."""
    text = json.dumps([first, second])
    write_whole(_path(path), lambda target: target.write_text(text))


def read(paths: Sequence[str]) -> Cold:
    """What cold engines answered that wrote it to these places."""
    return cold([said for path in paths for said in json.loads(_path(path).read_text())])


def cold(given: list[list[dict]]) -> Cold:
    """The first of several answers to the same prompts, and how far the others are from it."""
    first, *others = given
    same = [[_same(a["tokens"], b["tokens"]) for a, b in zip(first, other, strict=True)] for other in others]
    apart = [max(map(_apart, first, other, counts), default=0.0) for other, counts in zip(others, same, strict=True)]
    return Cold(first, max(apart), [min(counts) for counts in zip(*same, strict=True)])


def differing(found: list[dict], cold: Cold) -> list[str]:
    """Which answers are not the cold engine's, a sentence for each."""
    sentences = []
    for number, (answer, expected, steady) in enumerate(zip(found, cold.answers, cold.steady, strict=True)):
        tokens, wanted = answer["tokens"][:steady], expected["tokens"][:steady]
        apart = _apart(answer, expected, _same(tokens, wanted))
        if tokens != wanted:
            sentences.append(f"prompt {number}: expected tokens {wanted}, found {tokens}")
        elif apart > cold.apart:
            sentences.append(f"prompt {number}: log-probabilities {apart:.3g} apart")
    return sentences


def _path(path: str) -> Path:
    return Path(f"{path}.answers.json")


def _same(one: list[int], other: list[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _apart(one: dict, other: dict, count: int) -> float:
    """How far log-probabilities of the same tokens are apart; infinitely where one is no number."""
    pairs = zip(one["logprobs"][:count], other["logprobs"][:count], strict=True)
    return max((abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs), default=0.0)
