"""Draws the next token from logits, keyed by text and position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from colonnade.kernels.draws import draw_uniform


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: draws only among the k most likely tokens; None: among all.
        top_p: draws only among the most likely tokens that together have this probability (nucleus
            sampling, arXiv:1904.09751, section 3.1), after `top_k`; None: among all.
        seed: of the draws.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def sample_tokens(logits: Tensor, sampling: Sampling, texts: Tensor, positions: Tensor) -> Tensor:
    """Draws a token for each row of `[B, V]` logits.

    A draw is a function of the logits, the seed, the text's number in `texts` and the token's
    number in `positions`, `[B]` integers, so that it does not depend on the rest of the batch.

    Returns:
        `[B]` integers.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, float("-inf"))
    probabilities = scores.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    sums = probabilities.cumsum(-1)
    drawn = draw_uniform(sampling.seed, texts, positions)[:, None] * sums[:, -1:]
    tokens = torch.searchsorted(sums, drawn, right=True)
    # a product that rounds up to the sum of all would be past the last token
    last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)
    return tokens.minimum(last)[:, 0]


def nucleus(probabilities: Tensor, share: float) -> Tensor:
    """Returns `[B, V]` probabilities with zeros for all but the most likely tokens that have this
    share together."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # of the tokens that are more likely
    dropped = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, before >= share)
    return probabilities.masked_fill(dropped, 0)
