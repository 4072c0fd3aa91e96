"""Parameters and FLOPs of a model, from the records of its parameters. Imports no torch."""

from dataclasses import dataclass

from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.records import embedding, head, records_of


@dataclass(frozen=True)
class Size:
    """How large a model is, and what a token costs."""

    parameters: int  # all
    active: int  # those that one token meets, with a tied embedding counted once
    flops_per_token: int  # forward and backward, without recomputation


def measure(config: ModelConfig, seq_len: int) -> Size:
    """Count parameters and training FLOPs per token at this sequence length.

    2 FLOPs per weight that a token meets in a product, forward, and twice that backward (Kaplan et
    al. 2020, arXiv:2001.08361, section 2.1); an embedding lookup costs none, causal attention half
    of its square.
    """
    c = config
    records = {name: r for name, r in records_of(c).items() if not r.state}
    total = sum(r.elements for r in records.values())
    used = {name: int(r.elements * r.used) for name, r in records.items()}
    ends = sum(r.elements for r in [*embedding(c), *head(c)])
    in_ends = c.vocab * c.hidden  # met once by the model, and once by each further token
    met = sum(used.values()) - ends + (1 + c.mtp) * in_ends
    if c.share:  # every repeat uses the same sub-blocks again
        met += (c.repeat - 1) * sum(n for name, n in used.items() if name.startswith("blocks."))
    further = c.mtp_pattern * c.mtp
    mixing = sum(
        CARDS[symbol].mixing_flops(c, seq_len, index)
        for index, symbol in enumerate(c.symbols + further)
    )
    passes = 2 if c.has("T") else 1  # THOR's objective takes every token twice
    return Size(total, sum(used.values()), 3 * passes * (2 * met + mixing))
