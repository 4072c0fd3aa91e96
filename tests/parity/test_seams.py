"""Seams fail closed: sub-blocks of new classes are plugged as they declare, or refused by name."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_data_parallel import Trace, compare, recipe_for, trained
from torch.testing._internal.distributed.fake_pg import FakeStore

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.models import blocks
from colonnade.models.blocks import mamba1, mlp
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CHANNEL_MIXERS, ModelConfig
from colonnade.models.part import Part, Split
from colonnade.models.seams import Seam
from colonnade.parallel.seams import RefusedError
from colonnade.parallel.world import World


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Two ranks, one of which is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class OtherScan(Part):
    """Mamba-1's second half under another class; it shares code with it and no class."""

    seams = mamba1.ScanOut.seams
    select, forward = mamba1.ScanOut.select, mamba1.ScanOut.forward

    def __init__(self, config: ModelConfig, inner: int, out_std: float) -> None:
        super().__init__()
        like = mamba1.ScanOut(config, inner, out_std)
        self.chunk = like.chunk
        for name, p in like.named_parameters():
            spec = like.specs[name]
            self.declare(name, tuple(p.shape), spec.fill, spec.role, split=spec.split)


class Undeclared(OtherScan):
    """The same, whose author forgot the seams."""

    seams = None

    def __init__(self, config: ModelConfig, inner: int, out_std: float) -> None:
        super().__init__(config, inner, out_std)
        self.scan = mamba1.scan_here


class WithoutSeam(Undeclared):
    """The same, said to work token by token."""

    seams = ()


class Unknown(OtherScan):
    """The same with a seam of a name that nothing fills."""

    seams = (Seam("shuffle", mamba1.scan_here),)


class Other(SubBlock):
    """Mamba-1 put together from the halves above."""

    mixes = "sequence"
    half: type[OtherScan] = OtherScan

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        inner = 2 * config.hidden
        self.first, self.small = mamba1.InConv(config, inner), mamba1.Decay(inner, 4)
        self.second = self.half(config, inner, out_std)

    finish = mamba1.Mamba1.finish


class Nested(OtherScan):
    """The same, whose seam lies deeper than the half."""

    seams = ()

    def __init__(self, config: ModelConfig, inner: int, out_std: float) -> None:
        super().__init__(config, inner, out_std)
        self.deeper = Unknown(config, inner, out_std)


class Silent(OtherScan):
    """The same, which does not say how the scan's arguments lie over channels."""

    seams = (Seam("scan", mamba1.scan_here),)


class Unsaid(Other):
    """The same, which does not say that it mixes."""

    mixes = None  # type: ignore[assignment]


class WholeDown(mlp.Down):
    """An MLP's second half whose weight no split is declared for."""

    def __init__(self, config: ModelConfig, width: int, out_std: float) -> None:
        super().__init__(config, width, out_std)
        self.specs["down"].split = None


class SharedDown(mlp.Down):
    """The same, whose pieces several ranks may share."""

    def __init__(self, config: ModelConfig, width: int, out_std: float) -> None:
        super().__init__(config, width, out_std)
        self.specs["down"].split = Split(1, 1, "model.ffn", shared=True)


class Halfway(mlp.MLP):
    """An MLP with such a half."""

    half: type[mlp.Down] = WholeDown

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__(config, out_std)
        self.second = self.half(config, config.ffn, out_std)


class Sharing(Halfway):
    """An MLP with the other one."""

    half = SharedDown


def with_half(half: type[OtherScan]) -> type[Other]:
    """That sub-block with another second half."""
    return type("Other", (Other,), {"half": half})


def trained_as(rank: int, size: int, recipe: Recipe, symbol: str, name: str) -> Trace:
    """`trained`, where a symbol stands for another sub-block."""
    before = blocks.BLOCKS[symbol]
    blocks.BLOCKS[symbol] = globals()[name]
    try:
        return trained(rank, size, recipe)
    finally:
        blocks.BLOCKS[symbol] = before


@pytest.mark.parametrize("options", [{}, {"recurrence": "heads"}], ids=str)
def test_another_class_is_plugged(ranks1: Ranks, ranks2: Ranks, options: dict[str, Any]) -> None:
    """A copy of Mamba-1 once trained another function at cp=2, without a word."""
    expected = ranks1.run(trained_as, recipe_for("m-", {}, 8), "m", "Other")[0]
    laid = recipe_for("m-", {"cp": 2, **options}, 8)
    compare(ranks2.run(trained_as, laid, "m", "Other")[0], expected)


@pytest.mark.parametrize(("kind", "layout", "message"), [
    (with_half(Undeclared), {"cp": 2}, r"blocks\.0\.second: Undeclared does not declare its seams"),
    (with_half(WithoutSeam), {"cp": 2}, r"blocks\.0: Other mixes along the sequence"),
    (with_half(Unknown), {"cp": 2}, r"declares the seam 'shuffle', which no parallelism fills"),
    (with_half(Nested), {"cp": 2}, r"second\.deeper: Unknown declares the seam 'shuffle'"),
    (with_half(Silent), {"cp": 2, "recurrence": "heads"},
     r"the seam 'scan' of .*mamba1 does not say how its arguments lie over heads"),
    (Sharing, {"tp": 2}, r"blocks\.0\.second\.down: writes onto the stream"),
    (Unsaid, {"cp": 2}, r"blocks\.0: Unsaid does not say what it mixes"),
    (Halfway, {"tp": 2}, r"blocks\.0\.second\.down: writes onto the stream"),
])  # fmt: skip
def test_refused_by_name(
    fake_group: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[SubBlock],
    layout: dict[str, Any],
    message: str,
) -> None:
    symbol = "-" if issubclass(kind, Halfway) else "m"
    monkeypatch.setitem(blocks.BLOCKS, symbol, kind)
    pattern = symbol if symbol == "m" else "-*"
    with pytest.raises(RefusedError, match=message):
        build_model(recipe_for(pattern, layout, 8), World(0, 2, torch.device("cpu")))


def test_declared_as_the_table_says() -> None:
    """What a sub-block says that it mixes is what its symbol is taken for without building it."""
    for symbol, kind in blocks.BLOCKS.items():
        with torch.device("meta"):
            block = kind(ModelConfig(pattern=symbol), 1.0)
        assert (block.mixes == "channels") == (symbol in CHANNEL_MIXERS)
        assert all(half.seams is not None for half in (block.first, block.second))
