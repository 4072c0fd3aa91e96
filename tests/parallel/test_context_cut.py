"""How sequences are cut and who looks at what: on paper, without ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade.kernels.tiles import DocumentStarts, ScoreOptions, Tile, masked_tiles
from colonnade.parallel.context.hops import along, round_ring
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.ring import Ring

CUTS = [(n, zigzag) for n in (2, 3, 4, 5, 8) for zigzag in (True, False)]


def cuts(ranks: int, zigzag: bool) -> list[SequenceSharding]:
    return [SequenceSharding(ranks, rank, zigzag) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "zigzag"), CUTS)
def test_cut(ranks: int, zigzag: bool) -> None:
    whole = torch.arange(3 * 2 * ranks)[:, None]
    every = cuts(ranks, zigzag)
    parts = torch.cat([cut.mine(whole) for cut in every])
    assert sorted(parts[:, 0].tolist()) == whole[:, 0].tolist()
    for cut in every:
        assert torch.equal(cut.natural(parts), whole)
        assert torch.equal(cut.by_rank(whole), parts)
        for place, segment in enumerate(cut.own):
            assert cut.holder(segment) == (cut.rank, place)
    assert [cut.own for cut in cuts(2, True)] == [[0, 3], [1, 2]]  # as it is published


@pytest.mark.parametrize(("ranks", "zigzag"), CUTS)
def test_hops(ranks: int, zigzag: bool) -> None:
    """What one rank sends another one expects; segments go to their followers."""
    every = cuts(ranks, zigzag)
    for way in (round_ring, along):
        hops = [way(cut) for cut in every]
        for cut, hop in zip(every, hops, strict=True):
            for place, goal in enumerate(hop.to):
                if goal is not None:
                    assert hops[goal[0]].come[goal[1]] == (cut.rank, place)
                    if way is along:
                        assert every[goal[0]].own[goal[1]] == cut.own[place] + 1
            assert sum(p is None for p in hop.to) == (way is along and cut.segments - 1 in cut.own)
            assert hop.back().back() == hop


def positions(region: Tile, cut: SequenceSharding, held: list[int | None], n: int) -> Tensor:
    """Which scores of the whole a region is, `[S, S]`, by what rows and keys really are."""
    seen = torch.zeros(cut.segments * n, cut.segments * n, dtype=torch.bool)
    own = torch.cat([torch.arange(s * n, (s + 1) * n) for s in cut.own])
    there = torch.cat([torch.arange(s * n, (s + 1) * n) if s is not None else
                       torch.full((n,), -1) for s in held])  # fmt: skip
    rows, keys = own[region.rows], there[region.keys]
    assert (keys >= 0).all()
    shown = torch.ones(len(rows), len(keys), dtype=torch.bool)
    if region.query_start == region.key_start and len(rows) == len(keys):
        shown = shown.tril()
    seen[rows[:, None].expand_as(shown)[shown], keys.expand_as(shown)[shown]] = True
    return seen


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize(("ranks", "zigzag"), CUTS)
def test_ring_looks_at_everything_once(
    ranks: int, zigzag: bool, window: int | None, packed: bool
) -> None:
    n, rule = 3, ScoreOptions(1.0, window)
    total = torch.zeros((n * ranks * (2 if zigzag else 1),) * 2, dtype=torch.int)
    for cut in cuts(ranks, zigzag):
        ring = Ring(cut, n, rule, packed)
        for step in range(ring.steps):
            for region in ring.regions(step):
                total += positions(region, cut, ring.held(step), n)
    causal = torch.ones_like(total).tril()
    wanted = causal if window is None else causal.triu(1 - window)
    assert (total <= causal).all()
    assert (total >= wanted).all()
    if window is None:
        assert torch.equal(total, causal)
    else:  # no segment is sent farther than the window reaches
        reach = -(-(window - 1) // n)
        assert ring.steps == (reach + 1 if reach < ranks else ranks)


def test_zigzag_shares_the_work() -> None:
    """Equal work for all ranks; the longest way at each step, at 4 ranks, 1.75 times shorter."""
    longest = {}
    for zigzag in (True, False):
        n = 16 if zigzag else 32
        rings = [Ring(cut, n, ScoreOptions(1.0), False) for cut in cuts(4, zigzag)]
        work = [sum(map(ring.scores, range(ring.steps))) for ring in rings]
        assert sum(work) == (8 * 16) ** 2 / 2
        assert (len(set(work)) == 1) == zigzag
        longest[zigzag] = sum(max(ring.scores(step) for ring in rings) for step in range(4))
    assert longest[False] / longest[True] == 1.75


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 14),
    block=st.integers(1, 9),
    cut=st.tuples(st.integers(0, 30), st.integers(1, 30)),
    fused=st.booleans(),
    documents=st.booleans(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_pieces(
    lengths: list[int], window: int | None, block: int, cut: tuple[int, int], fused: bool,
    documents: bool,
) -> None:  # fmt: skip
    """Pieces of a region are what is visible of it, each score at most once."""
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:, None]
    S = len(rows)
    place = torch.arange(S)
    wanted = place[:, None] >= place
    if window is not None:
        wanted &= place[:, None] - place < window
    if documents:
        wanted &= rows == rows.T
    at, seen = min(cut[0], S - 1), min(cut[0] + cut[1], S) // 3
    region = Tile(slice(0, S - at), at, slice(0, S - seen), seen)
    found = torch.zeros(S, S, dtype=torch.int)
    import colonnade.kernels.tiles as module

    before, module.BLOCK = module.BLOCK, block
    try:
        options: Any = ScoreOptions(1.0, window), DocumentStarts(rows) if documents else None, fused
        for piece in masked_tiles(region, *options):
            r, k = torch.arange(S - at)[piece.rows] + at, torch.arange(S - seen)[piece.keys] + seen
            shown = torch.ones(len(r), len(k), dtype=torch.bool)
            if piece.causal:
                shown = shown.tril()
            if piece.visible is not None:
                shown = piece.visible[0, 0]
            found[r[:, None], k] += shown
    finally:
        module.BLOCK = before
    assert torch.equal(found[at:, seen:], wanted[at:, seen:].int())
