"""Sequence shardings, routes and the tiles of a ring, computed for all ranks in one process."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade.kernels.tiles import DocumentStarts, ScoreOptions, Tile, masked_tiles
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.p2p import next_segment_route, ring_route
from colonnade.parallel.context.ring import Ring

SHARDINGS = [(n, zigzag) for n in (2, 3, 4, 5, 8) for zigzag in (True, False)]


def all_ranks(size: int, zigzag: bool) -> list[SequenceSharding]:
    return [SequenceSharding(size, rank, zigzag) for rank in range(size)]


@pytest.mark.parametrize(("size", "zigzag"), SHARDINGS)
def test_sharding(size: int, zigzag: bool) -> None:
    full = torch.arange(3 * 2 * size)[:, None]
    shardings = all_ranks(size, zigzag)
    shards = torch.cat([sharding.shard(full) for sharding in shardings])
    assert sorted(shards[:, 0].tolist()) == full[:, 0].tolist()
    for sharding in shardings:
        assert torch.equal(sharding.in_sequence_order(shards), full)
        assert torch.equal(sharding.in_rank_order(full), shards)
        for index, segment in enumerate(sharding.local_segments):
            assert sharding.owner(segment) == (sharding.rank, index)
    # as it is published
    assert [sharding.local_segments for sharding in all_ranks(2, True)] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("size", "zigzag"), SHARDINGS)
def test_routes(size: int, zigzag: bool) -> None:
    """What one rank sends another one expects; segments go to their followers."""
    shardings = all_ranks(size, zigzag)
    for to_route in (ring_route, next_segment_route):
        to_next = to_route is next_segment_route
        routes = [to_route(sharding) for sharding in shardings]
        for sharding, route in zip(shardings, routes, strict=True):
            segments = sharding.local_segments
            for index, destination in enumerate(route.destinations):
                if destination is not None:
                    peer, slot = destination
                    assert routes[peer].sources[slot] == (sharding.rank, index)
                    if to_next:
                        assert shardings[peer].local_segments[slot] == segments[index] + 1
            has_last = sharding.segments - 1 in segments
            assert sum(d is None for d in route.destinations) == (to_next and has_last)
            assert route.reversed().reversed() == route


def computed_scores(
    tile: Tile, sharding: SequenceSharding, key_segments: list[int | None], n: int
) -> Tensor:
    """Which scores of the full sequence a tile computes, `[S, S]`, by the positions of the rows of
    queries and keys that the rank really has."""
    computed = torch.zeros(sharding.segments * n, sharding.segments * n, dtype=torch.bool)
    query_positions = torch.cat([torch.arange(s * n, (s + 1) * n) for s in sharding.local_segments])
    key_positions = torch.cat([torch.arange(s * n, (s + 1) * n) if s is not None else
                               torch.full((n,), -1) for s in key_segments])  # fmt: skip
    rows, keys = query_positions[tile.rows], key_positions[tile.keys]
    assert (keys >= 0).all()
    visible = torch.ones(len(rows), len(keys), dtype=torch.bool)
    if tile.query_start == tile.key_start and len(rows) == len(keys):
        visible = visible.tril()
    computed[rows[:, None].expand_as(visible)[visible], keys.expand_as(visible)[visible]] = True
    return computed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize(("size", "zigzag"), SHARDINGS)
def test_ring_computes_every_score_once(
    size: int, zigzag: bool, window: int | None, packed: bool
) -> None:
    n, score_options = 3, ScoreOptions(1.0, window)
    total = torch.zeros((n * size * (2 if zigzag else 1),) * 2, dtype=torch.int)
    for sharding in all_ranks(size, zigzag):
        ring = Ring(sharding, n, score_options, packed)
        for step in range(ring.steps):
            for tile in ring.tiles(step):
                total += computed_scores(tile, sharding, ring.key_segments(step), n)
    causal = torch.ones_like(total).tril()
    wanted = causal if window is None else causal.triu(1 - window)
    assert (total <= causal).all()
    assert (total >= wanted).all()
    if window is None:
        assert torch.equal(total, causal)
    else:  # no segment is sent farther than the window reaches
        reach = -(-(window - 1) // n)
        assert ring.steps == (reach + 1 if reach < size else size)


def test_zigzag_balances_the_work() -> None:
    """Equal work for all ranks; the sum of every step's slowest rank is 1.75 times less at 4."""
    critical_path = {}
    for zigzag in (True, False):
        n = 16 if zigzag else 32
        rings = [Ring(sharding, n, ScoreOptions(1.0), False) for sharding in all_ranks(4, zigzag)]
        work = [sum(map(ring.score_count, range(ring.steps))) for ring in rings]
        assert sum(work) == (8 * 16) ** 2 / 2
        assert (len(set(work)) == 1) == zigzag
        critical_path[zigzag] = sum(
            max(ring.score_count(step) for ring in rings) for step in range(4)
        )
    assert critical_path[False] / critical_path[True] == 1.75


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 14),
    block=st.integers(1, 9),
    starts=st.tuples(st.integers(0, 30), st.integers(1, 30)),
    fused=st.booleans(),
    documents=st.booleans(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_masked_tiles(
    lengths: list[int], window: int | None, block: int, starts: tuple[int, int], fused: bool,
    documents: bool,
) -> None:  # fmt: skip
    """The masked tiles of a tile compute what is visible in it, each score at most once."""
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:, None]
    S = len(rows)
    position = torch.arange(S)
    wanted = position[:, None] >= position
    if window is not None:
        wanted &= position[:, None] - position < window
    if documents:
        wanted &= rows == rows.T
    query_start = min(starts[0], S - 1)
    key_start = min(starts[0] + starts[1], S) // 3
    tile = Tile(slice(0, S - query_start), query_start, slice(0, S - key_start), key_start)
    computed = torch.zeros(S, S, dtype=torch.int)
    import colonnade.kernels.tiles as module

    before, module.BLOCK = module.BLOCK, block
    try:
        options: Any = ScoreOptions(1.0, window), DocumentStarts(rows) if documents else None, fused
        for masked in masked_tiles(tile, *options):
            queries = torch.arange(S - query_start)[masked.rows] + query_start
            keys = torch.arange(S - key_start)[masked.keys] + key_start
            visible = torch.ones(len(queries), len(keys), dtype=torch.bool)
            if masked.causal:
                visible = visible.tril()
            if masked.visible is not None:
                visible = masked.visible[0, 0]
            computed[queries[:, None], keys] += visible
    finally:
        module.BLOCK = before
    assert torch.equal(computed[query_start:, key_start:], wanted[query_start:, key_start:].int())
