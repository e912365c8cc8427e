"""What a model says by its own forward pass: greedy tokens, their log-probabilities, and how clear each choice was.

`logits_of` takes int64 tokens [sequences, length] and returns logits [sequences, length, vocabulary]. Sequences of
different lengths are padded on the right, where a causal model's earlier positions don't see it. Every position is
computed anew: no cache that could be stale.
"""

from collections.abc import Callable

import torch

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
PADDING = 0


def greedy(logits_of: LogitsOf, prompts: list[list[int]], max_tokens: int, device: torch.device) -> list[dict]:
    """For each prompt `max_tokens` greedy tokens, their log-probabilities, and the gaps best - second best logit.

    The model's logits are taken as they are and the rest is done in float32. A gap within the rounding of the model's
    dtype means that another right computation may have chosen otherwise from there on.
    """
    sequences = [list(prompt) for prompt in prompts]
    found: list[dict] = [{"tokens": [], "logprobs": [], "gaps": []} for _ in prompts]
    for _ in range(max_tokens):
        logits = _forward(logits_of, sequences, device)
        for index, sequence in enumerate(sequences):
            last = logits[index, len(sequence) - 1].float()
            best, second = last.topk(2).values.tolist()
            token = int(last.argmax())
            found[index]["tokens"].append(token)
            found[index]["logprobs"].append(best - float(last.logsumexp(0)))
            found[index]["gaps"].append(best - second)
            sequence.append(token)
    return found


def score(
    logits_of: LogitsOf, prompts: list[list[int]], continuations: list[list[int]], device: torch.device
) -> list[list[float]]:
    """The log-probability of every token of every continuation, given its prompt and the tokens before it."""
    pairs = list(zip(prompts, continuations, strict=True))
    logits = _forward(logits_of, [[*prompt, *continuation] for prompt, continuation in pairs], device)
    scores = []
    for index, (prompt, continuation) in enumerate(pairs):
        predicting = logits[index, len(prompt) - 1 : len(prompt) - 1 + len(continuation)].float()
        chosen = torch.tensor(continuation, dtype=torch.int64, device=device).unsqueeze(1)
        scores.append(predicting.log_softmax(-1).gather(1, chosen).squeeze(1).tolist())
    return scores


def _forward(logits_of: LogitsOf, sequences: list[list[int]], device: torch.device) -> torch.Tensor:
    longest = max(map(len, sequences))
    padded = [sequence + [PADDING] * (longest - len(sequence)) for sequence in sequences]
    with torch.no_grad():
        return logits_of(torch.tensor(padded, dtype=torch.int64, device=device))
