"""What ranks that share sequences send each other, by formula: as the cards declare their seams.

Of the forward and backward pass of one micro-batch. What FSDP2 sends, weights and their gradients,
and what tensor parallelism sends, is not in it.
"""

from dataclasses import dataclass

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.config import CARDS, ModelConfig
from colonnade.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes that the ranks of context parallelism send; attention without windows.

    Attributes:
        model: the sub-blocks.
        parallel: their layout.
        rows: of a micro-batch.
        seq_len: tokens of a row over all ranks.
        number: bytes of an activation.
    """

    model: ModelConfig
    parallel: ParallelConfig
    rows: int
    seq_len: int
    number: int

    @property
    def wide(self) -> int:
        """Bytes of what is kept in at least fp32."""
        return max(self.number, 4)

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.rows * self.seq_len // self.parallel.cp

    def sent(self, rank: int) -> int:
        """Bytes that a rank of the context axis sends."""
        return sum(self.of_sub_block(CARDS[symbol], rank) for symbol in self.model.symbols)

    def of_sub_block(self, card: Card, rank: int) -> int:
        """Bytes of one sub-block: by its operator along the sequence, and by its convolutions."""
        mixing = card.mixing
        if mixing is None:
            return 0
        halo = self.segments_sent(rank) * self.rows * self.halo(card) * self.number
        if mixing.state is None:
            return self.attention(mixing) + halo
        if self.parallel.recurrence == "heads":
            operands = [*mixing.arguments.values(), mixing.result]
            return self.exchanged(operands, self.parallel.cp) + halo
        return self.states(mixing.state(self.model)) + halo

    def attention(self, mixing: Mixing) -> int:
        """Ring or all-gather of keys and values among some ranks, all-to-all of heads among others.

        Keys and values go round, and their gradients come home in `wide` bytes a number; or all are
        gathered, and gradients scattered.
        """
        model, parallel = self.model, self.parallel
        q, k, v = mixing.arguments.values()
        exchanging = parallel.ulysses_degree(q.count(model))
        others = parallel.cp // exchanging - 1
        heads = max(k.count(model), exchanging)  # at least one for each rank
        pairs = self.tokens * heads * (k.width(model) + v.width(model))
        home = others if parallel.context == "allgather" else others + 1
        round_trip = 2 * others * pairs * self.number + (home * pairs * self.wide if others else 0)
        return round_trip + self.exchanged([q, k, v, mixing.result], exchanging)

    def exchanged(self, operands: list[Argument], ranks: int) -> int:
        """All-to-all of what an operator takes and gives, and of its gradients: sequences are
        exchanged for heads. What all heads share goes to every rank."""
        numbers = sum(self.bytes_of(operand, ranks) for operand in operands if operand.present)
        return 2 * self.tokens * numbers * (ranks - 1) // ranks

    def bytes_of(self, operand: Argument, ranks: int) -> int:
        """Bytes of a token of an operand, where so many ranks exchange it."""
        each = operand.width(self.model) * (self.wide if operand.wide else self.number)
        count = operand.count(self.model)
        return (
            each
            * {
                "head": count,
                "group": max(count, ranks),
                "shared": ranks,
                "constant": 0,
            }[operand.kind]
        )

    def states(self, numbers: int) -> int:
        """The state that each segment leaves and its transition, and gradients, to all others."""
        segments = 2 if self.parallel.zigzag else 1
        return 2 * (self.parallel.cp - 1) * segments * self.rows * numbers * self.wide

    def halo(self, card: Card) -> int:
        """Numbers that the convolutions of a sub-block read of the tokens before a segment."""
        records = card.parameters(self.model, 1.0)
        filters = [r.shape for r in records if r.name.startswith("conv_") and len(r.shape) == 2]
        return sum((taps - 1) * width for width, taps in filters)

    def segments_sent(self, rank: int) -> int:
        """Segments whose last rows go to another rank, and those whose rows' gradients do."""
        neighbours = (rank > 0) + (rank < self.parallel.cp - 1)
        return neighbours * (2 if self.parallel.zigzag else 1)
