"""Counts of parameters and FLOPs of a model, from its records. Imports no torch."""

from dataclasses import dataclass

from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.records import embedding, head, records_of


@dataclass(frozen=True)
class Size:
    """The size of a model and its FLOPs per token."""

    parameters: int  # in total
    active: int  # used by one token, with a tied embedding counted once
    flops_per_token: int  # forward and backward, without recomputation


def measure(config: ModelConfig, seq_len: int) -> Size:
    """Counts parameters, and training FLOPs per token at this sequence length.

    These are 2 FLOPs per weight that a token is multiplied with, forward, and twice that backward
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); an embedding lookup costs none, causal
    attention half of its square.
    """
    c = config
    records = {name: r for name, r in records_of(c).items() if not r.state}
    total = sum(r.elements for r in records.values())
    used = {name: int(r.elements * r.used) for name, r in records.items()}
    ends = sum(r.elements for r in [*embedding(c), *head(c)])
    projection = c.vocab * c.hidden  # used once by the model, and once by each MTP module
    multiplied = sum(used.values()) - ends + (1 + c.mtp) * projection
    if c.share:  # every repeat uses the same sub-blocks
        multiplied += (c.repeat - 1) * sum(
            n for name, n in used.items() if name.startswith("blocks.")
        )
    mtp_row = c.mtp_pattern * c.mtp
    mixing = sum(
        CARDS[symbol].mixing_flops(c, seq_len, index)
        for index, symbol in enumerate(c.symbols + mtp_row)
    )
    passes = 2 if c.has("T") else 1  # THOR computes every token twice
    return Size(total, sum(used.values()), 3 * passes * (2 * multiplied + mixing))
