"""Seams fail closed: those of new classes are filled as they are declared, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_data_parallel import Trace, compare, recipe_for, trained
from torch.testing._internal.distributed.fake_pg import FakeStore

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.models.blocks import mamba1
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.experts import ExpertBlock
from colonnade.models.cards.base import Card
from colonnade.models.cards.mamba1 import Mamba1Card
from colonnade.models.cards.mlp import MLPCard
from colonnade.models.cards.thor import ThorCard
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, Split, of_half
from colonnade.models.seams import Seam
from colonnade.parallel.seams import RefusedError
from colonnade.parallel.world import World


@pytest.fixture
def fake_group() -> Iterator[None]:
    """One of two ranks, on the fake backend."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class OtherScan(ParameterModule):
    """Mamba-1's second half as another class, which uses its functions and does not inherit."""

    seams = mamba1.ScanOut.seams
    select, forward = mamba1.ScanOut.select, mamba1.ScanOut.forward

    def __init__(self, records: list[ParameterSpec], chunk: int) -> None:
        super().__init__(records)
        self.chunk, self.norm, self.eps = chunk, "none", 1e-5


class Undeclared(OtherScan):
    """The same without a declaration of seams."""

    seams = None

    def __init__(self, records: list[ParameterSpec], chunk: int) -> None:
        super().__init__(records, chunk)
        self.scan = mamba1.local_scan


class WithoutSeam(Undeclared):
    """The same, declared to work token by token."""

    seams = ()


class Unknown(OtherScan):
    """The same with a seam of a name that nothing fills."""

    seams = (Seam("shuffle", mamba1.local_scan),)


class Nested(OtherScan):
    """The same with a seam in a nested module of the half."""

    seams = mamba1.ScanOut.seams

    def __init__(self, records: list[ParameterSpec], chunk: int) -> None:
        super().__init__(records, chunk)
        self.nested = Unknown([], chunk)


class WithoutArguments(OtherScan):
    """The same, whose seam does not declare how its arguments lie over channels."""

    seams = (Seam("scan", mamba1.local_scan),)


class Other(SubBlock):
    """Mamba-1 with one of the second halves above."""

    half: type[OtherScan] = OtherScan

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        records = card.records(config, out_std)
        self.first = mamba1.InConv(of_half(records, "first"))
        self.small = mamba1.Decay(of_half(records, "small"))
        self.second = self.half(of_half(records, "second"), config.mamba1_chunk)

    finish = mamba1.Mamba1.finish


class OtherCard(Mamba1Card):
    """The card of `Other` with one of those halves."""

    def __init__(self, half: type[OtherScan] = OtherScan) -> None:
        self.half = half

    def build(self, config: ModelConfig, out_std: float) -> SubBlock:
        kind: type[Other] = type("Other", (Other,), {"half": self.half})
        return kind(self, config, out_std)


class WithoutMixing(Card):
    """A card that does not declare what it mixes."""

    symbol, title = "m", "Mamba-1"
    parameters = Mamba1Card.parameters

    def build(self, config: ModelConfig, out_std: float) -> SubBlock:
        return Other(self, config, out_std)


class Down(MLPCard):
    """An MLP whose second half's weight has another split, or none."""

    def __init__(self, split: Split | None) -> None:
        self.split = split

    def parameters(self, config: ModelConfig, out_std: float) -> list[ParameterSpec]:
        records = super().parameters(config, out_std)
        for record in of_half(records, "second"):
            record.tp = self.split
        return records


class OtherExperts(ThorCard):
    """THOR whose block changes before anything is sharded."""

    def __init__(self, change: Callable[[ExpertBlock], object]) -> None:
        self.change = change

    def build(self, config: ModelConfig, out_std: float) -> SubBlock:
        block = super().build(config, out_std)
        assert isinstance(block, ExpertBlock)
        self.change(block)
        return block


def without_seam(block: ExpertBlock) -> None:
    """Its dispatch stays local whatever the layout."""
    block.first.seams = ()  # type: ignore[misc]


def with_weight_elsewhere(block: ExpertBlock) -> None:
    """A weight of experts is in the second half as well."""
    (up,) = (spec for name, spec in block.experts.specs.items() if name == "up")
    block.second.register(up)


CASES: list[tuple[Card, dict[str, Any], str]] = [
    (OtherCard(Undeclared), {"cp": 2},
     r"blocks\.0\.second: Undeclared does not declare its seams"),
    (OtherCard(WithoutSeam), {"cp": 2}, r"blocks\.0: Other mixes along the sequence"),
    (OtherCard(Unknown), {"cp": 2}, r"declares the seam 'shuffle', which no parallelism fills"),
    (OtherCard(Nested), {"cp": 2}, r"second\.nested: Unknown declares the seam 'shuffle'"),
    (OtherCard(WithoutArguments), {"cp": 2, "recurrence": "heads"},
     r"the seam 'scan' of .* does not say how its arguments lie over heads"),
    (WithoutMixing(), {"cp": 2}, r"blocks\.0: the card of Other does not say what it mixes"),
    (Down(None), {"tp": 2}, r"blocks\.0\.second\.down: writes onto the stream"),
    (Down(Split(1, 1, "model.ffn", replicable=True)), {"tp": 2},
     r"blocks\.0\.second\.down: writes onto the stream"),
    (OtherExperts(without_seam), {"ep": 2}, r"blocks\.0: Thor has experts and no seams where"),
    (OtherExperts(with_weight_elsewhere), {"ep": 2},
     r"blocks\.0\.second\.up: is sharded over expert-parallel ranks, and is not"),
]  # fmt: skip


def trained_with(rank: int, size: int, recipe: Recipe, card: Card) -> Trace:
    """`trained`, with this card for its symbol."""
    with patch.dict(CARDS, {card.symbol: card}):
        return trained(rank, size, recipe)


@pytest.mark.parametrize("options", [{}, {"recurrence": "heads"}], ids=str)
def test_another_class_is_filled(ranks1: Ranks, ranks2: Ranks, options: dict[str, Any]) -> None:
    """A copy of Mamba-1 trains the same function at cp=2; one that was left local would not."""
    expected = ranks1.run(trained_with, recipe_for("m-", {}, 8), OtherCard())[0]
    recipe = recipe_for("m-", {"cp": 2, **options}, 8)
    compare(ranks2.run(trained_with, recipe, OtherCard())[0], expected)


@pytest.mark.parametrize(("card", "layout", "message"), CASES)
def test_refused_by_name(
    fake_group: None, card: Card, layout: dict[str, Any], message: str
) -> None:
    pattern = "-*" if card.symbol == "-" else card.symbol
    with (
        patch.dict(CARDS, {card.symbol: card}),
        pytest.raises(RefusedError, match=message),
    ):
        build_model(recipe_for(pattern, layout, 8), World(0, 2, torch.device("cpu")))


def test_halves_declare_their_seams() -> None:
    """A mixer also declares the seam that its card names."""
    for symbol, card in CARDS.items():
        with torch.device("meta"):
            block = card.build(ModelConfig(pattern=symbol), 1.0)
        declared = [half.seams for half in (block.first, block.second)]
        assert None not in declared
        names = {seam.name for seams in declared for seam in seams or ()}
        assert card.mixing is None or card.mixing.seam in names
