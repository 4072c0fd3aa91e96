"""What forward passes keep for backward, on the device and in the host's memory, for dry runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from colonnade.models.decoder import Decoder
from colonnade.parallel.recompute import stash_of
from colonnade.parallel.storages import ACTIVATIONS, StorageLedger, storage_bytes


class Mark(NamedTuple):
    """The end of a forward pass.

    Attributes:
        at: the ledger's mark.
        leaving: bytes of activations that a stash frees when the next forward pass runs.
    """

    at: int
    leaving: int

    @classmethod
    def of(cls, ledger: StorageLedger, model: Decoder) -> "Mark":
        """Returns a mark at this moment."""
        stash = stash_of(model)
        return cls(ledger.mark(), 0 if stash is None else storage_bytes(stash.on_device()))


def on_host(model: Decoder) -> Sequence[Tensor]:
    """Returns the memory of the host that a model's stash has."""
    stash = stash_of(model)
    return () if stash is None else stash.on_host()


def held_by_stage(
    ledger: StorageLedger, marks: Mapping[int, Mark], kind: str = ACTIVATIONS
) -> dict[int, int]:
    """Returns the bytes of this kind that each stage's forward pass keeps, from the marks at the
    ends of these."""
    held, before = {}, 0
    for stage, mark in marks.items():
        kept = ledger.held(mark.at).get(kind, 0) - (mark.leaving if kind == ACTIVATIONS else 0)
        held[stage], before = kept - before, kept
    return held
