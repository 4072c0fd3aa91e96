"""Bytes that ranks send, by formula: over the `cp` axis from what the cards declare of their seams,
over the `ep` and `etp` axes from the choices of experts.

They are those of the forward and backward pass of one micro-batch. The collectives of FSDP2
(weights and their gradients) and of tensor parallelism are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.config import CARDS, ModelConfig
from colonnade.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes that ranks send over the context group; attention is counted without windows.

    Attributes:
        model: the sub-blocks.
        parallel: their layout.
        rows: of a micro-batch.
        seq_len: tokens of a row over all ranks.
        number: bytes of one number of an activation.
    """

    model: ModelConfig
    parallel: ParallelConfig
    rows: int
    seq_len: int
    number: int

    @property
    def wide(self) -> int:
        """Bytes of one number of a tensor that is sent in at least fp32."""
        return max(self.number, 4)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.rows * self.seq_len // self.parallel.cp

    def bytes_sent(self, rank: int) -> int:
        """Bytes that the rank with this index in the context group sends."""
        return sum(self.sub_block_bytes(CARDS[symbol], rank) for symbol in self.model.symbols)

    def sub_block_bytes(self, card: Card, rank: int) -> int:
        """Bytes of one sub-block: its operator along the sequence, and its convolutions' halos."""
        mixing = card.mixing
        if mixing is None:
            return 0
        halo = self.halo_messages(rank) * self.rows * self.halo_width(card) * self.number
        if mixing.state is None:
            return self.attention_bytes(mixing) + halo
        if self.parallel.recurrence == "heads":
            operands = [*mixing.arguments.values(), mixing.result]
            return self.all_to_all_bytes(operands, self.parallel.cp) + halo
        return self.state_bytes(mixing.state(self.model)) + halo

    def attention_bytes(self, mixing: Mixing) -> int:
        """Ring send/recv or all-gather of keys and values over the outer group, and all-to-all of
        heads over the inner group.

        In a ring the gradients of keys and values are sent as often as there are ranks, in `wide`
        bytes a number. After an all-gather they are reduce-scattered.
        """
        model, parallel = self.model, self.parallel
        q, k, v = mixing.arguments.values()
        inner = parallel.ulysses_degree(q.count(model))
        other_ranks = parallel.cp // inner - 1  # of the outer group
        heads = max(k.count(model), inner)  # at least one for each rank
        kv = self.tokens * heads * (k.width(model) + v.width(model))
        grad_sends = other_ranks if parallel.context == "allgather" else other_ranks + 1
        outer = 2 * other_ranks * kv * self.number
        if other_ranks:
            outer += grad_sends * kv * self.wide
        return outer + self.all_to_all_bytes([q, k, v, mixing.result], inner)

    def all_to_all_bytes(self, operands: list[Argument], ranks: int) -> int:
        """All-to-all of an operator's arguments and results, and of their gradients, between shards
        of the sequence and of the heads. Arguments that all heads share are all-gathered."""
        per_token = sum(
            self.operand_bytes(operand, ranks) for operand in operands if operand.present
        )
        return 2 * self.tokens * per_token * (ranks - 1) // ranks

    def operand_bytes(self, operand: Argument, ranks: int) -> int:
        """Bytes of an operand for each token, where it is exchanged between this many ranks."""
        heads = operand.count(self.model)
        copies = {
            "head": heads,
            "group": max(heads, ranks),
            "shared": ranks,
            "constant": 0,
        }[operand.kind]
        return copies * operand.width(self.model) * (self.wide if operand.wide else self.number)

    def state_bytes(self, numbers: int) -> int:
        """All-gather of each segment's final state and transition, and of their gradients; both
        together have this many numbers."""
        segments = 2 if self.parallel.zigzag else 1
        return 2 * (self.parallel.cp - 1) * segments * self.rows * numbers * self.wide

    def halo_width(self, card: Card) -> int:
        """Numbers that the convolutions of a sub-block read from the tokens before a segment."""
        records = card.parameters(self.model, 1.0)
        filters = [r.shape for r in records if r.name.startswith("conv_") and len(r.shape) == 2]
        return sum((taps - 1) * width for width, taps in filters)

    def halo_messages(self, rank: int) -> int:
        """How many halos a rank sends to other ranks, and gradients of halos, by send/recv."""
        neighbours = (rank > 0) + (rank < self.parallel.cp - 1)
        return neighbours * (2 if self.parallel.zigzag else 1)


@dataclass(frozen=True)
class ExpertTraffic:
    """Bytes that ranks send for one sub-block with experts, over the group of its all-to-all.

    The rows of chosen experts are sent four times: by dispatch, on the way back, and as gradients
    of both. Their numbers are sent once. Choices that a capacity drops are not sent.

    Attributes:
        model: whose experts they are.
        parallel: the layout.
        number: bytes of one number of an activation.
    """

    model: ModelConfig
    parallel: ParallelConfig
    number: int

    @property
    def shares_tokens(self) -> bool:
        """Whether tensor-parallel ranks send shares of their tokens; else each sends all of them,
        to its own shards of the experts."""
        return self.shards != self.parallel.tp

    @property
    def shards(self) -> int:
        """Ranks that shard an expert."""
        return self.parallel.etp or self.parallel.tp

    @property
    def copies(self) -> int:
        """Ranks of the group to which the row of a choice goes."""
        return self.shards if self.shares_tokens else 1

    @property
    def ranks(self) -> int:
        """The size of the group."""
        return self.parallel.ep * self.copies

    def rows_by_rank(self, loads: Sequence[int]) -> list[int]:
        """Returns how many rows a rank sends to each rank of the group, itself included.

        `loads` are the numbers of its choices of each expert, without dropped ones.
        """
        per_rank = self.model.experts // self.parallel.ep
        starts = [rank // self.copies * per_rank for rank in range(self.ranks)]
        return [sum(loads[start : start + per_rank]) for start in starts]

    def bytes_sent(self, rank: int, loads: Sequence[Sequence[int]]) -> int:
        """Returns the bytes that the rank with this index in the group sends.

        `loads` are those of every rank of the group, as for `rows_by_rank`.
        """
        rows = [self.rows_by_rank(of_rank) for of_rank in loads]
        sent = sum(rows[rank]) - rows[rank][rank]
        received = sum(to_ranks[rank] for to_ranks in rows) - rows[rank][rank]
        # Dispatch and the gradient of the way back send the first, the others return the second.
        return 2 * (sent + received) * self.model.hidden * self.number + self.counts_bytes

    def even_bytes(self, tokens: int, choices: int) -> int:
        """Returns the bytes that a rank sends where every expert gets as many rows from every rank.

        Args:
            tokens: of a micro-batch on one rank.
            choices: experts of a token.
        """
        if self.shares_tokens:
            tokens //= self.parallel.tp
        numbers = tokens * choices * self.copies * self.model.hidden
        return 4 * numbers * self.number * (self.ranks - 1) // self.ranks + self.counts_bytes

    @property
    def counts_bytes(self) -> int:
        """Bytes of the all-to-all of the numbers of rows, one int64 for each expert of a rank."""
        return 8 * self.model.experts // self.parallel.ep * (self.ranks - 1)
