"""Bytes sent over the expert group: every layout counted, against its formula."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from colonnade.bench import traffic
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.models.blocks.experts import Routed, Sent
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.cost import ExpertTraffic
from colonnade.parallel.experts import TokenExchange
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.world import World

ROWS, TOKENS, EXPERTS = 2, 16, 8
SMALL: dict[str, Any] = {
    "hidden": 12, "vocab": 16, "heads": 4, "head_dim": 4, "ffn": 8, "experts": EXPERTS,
}  # fmt: skip
# Ranks, fields of `[parallel]`, of `[model]`, of `[train]`.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ep 2": (2, {"ep": 2}, {}, {}),
    "ep 2, edp 2": (4, {"ep": 2}, {}, {}),
    "ep 4": (4, {"ep": 4}, {}, {}),
    "ep 4, bf16": (4, {"ep": 4}, {}, {"precision": "bf16"}),
    "ep 2, cp 2": (2, {"ep": 2, "cp": 2}, {}, {}),
    "ep 2, etp 2, tp 2": (4, {"ep": 2, "etp": 2, "tp": 2}, {}, {}),
    "ep 2, tp 2, etp 1": (2, {"ep": 2, "tp": 2, "etp": 1}, {}, {}),
    "ep 2, tp 2, etp 1, edp 2": (4, {"ep": 2, "tp": 2, "etp": 1}, {}, {}),
    "etp 2": (2, {"etp": 2}, {}, {}),
    "ep 2, etp 2": (4, {"ep": 2, "etp": 2}, {}, {}),
    "capacity": (4, {"ep": 4}, {"capacity": 0.75}, {}),
    "capacity, tp 2, etp 1": (2, {"ep": 2, "tp": 2, "etp": 1}, {"capacity": 0.75}, {}),
    "ladder": (2, {"ep": 2}, {"residual": "ladder"}, {}),
    "THOR": (2, {"ep": 2}, {"pattern": "*T"}, {}),
    **{
        f"recomputed, {name}": (2, {"ep": 2}, {"residual": residual}, {"recompute": name})
        for name, residual in (("block", "standard"), ("selective", "ladder"))
    },
}


class Counted(NamedTuple):
    """What one rank has sent to the experts."""

    bytes: int
    collectives: tuple[int, int]  # all-to-alls of rows, and of their numbers
    group: list[int]  # the ranks of its all-to-alls
    loads: list[list[int]]  # of every sub-block, the choices of each expert that it sends


def recipe(name: str) -> Recipe:
    _, layout, model, train = CASES[name]
    return Recipe(
        model=ModelConfig(**{"pattern": "*E", "repeat": 2, **SMALL, **model}),
        parallel=ParallelConfig(**layout),
        train=TrainConfig(micro_batch=ROWS, seq_len=TOKENS, **train),
    )


class Recorder:
    """Keeps what a mixture hands to `dispatch`: the loads of this rank's share of the tokens.

    Recomputation dispatches again, so only the first call counts.
    """

    def __init__(self, exchange: TokenExchange) -> None:
        self.exchange = exchange
        self.loads: list[int] | None = None

    def dispatch(self, routed: Routed, experts: int) -> Sent:
        if self.loads is None:
            kept = routed.chosen if routed.keep_mask is None else routed.chosen.masked_fill(
                ~routed.keep_mask, experts
            )  # fmt: skip
            share = kept.flatten(0, 1).chunk(self.exchange.shares)[self.exchange.share]
            self.loads = share.flatten().bincount(minlength=experts)[:experts].tolist()
        return self.exchange.dispatch(routed, experts)


def counted(rank: int, size: int) -> dict[str, Counted]:
    """Runs the cases of this many ranks."""
    names = [name for name, (ranks, *_) in CASES.items() if ranks == size]
    return {name: run(World(rank, size, torch.device("cpu")), recipe(name)) for name in names}


def run(world: World, case: Recipe) -> Counted:
    recorders: list[Recorder] = []

    def record(model: Decoder) -> None:
        for block in expert_blocks(model):
            recorders.append(Recorder(block.first.dispatch.__self__))  # type: ignore[attr-defined]
            block.first.dispatch = recorders[-1].dispatch

    sent = traffic.count(world, case, record)
    to_all = {key: n for key, n in sent.bytes.items() if key[0] == "all_to_all_single"}
    calls = {key[1]: n for key, n in sent.calls.items() if key in to_all}
    counts = calls.pop(torch.int64)
    return Counted(
        sum(to_all.values()),
        (sum(calls.values()), counts),
        dist.get_process_group_ranks(recorders[0].exchange.group),
        [recorder.loads or [] for recorder in recorders],
    )


def formula(case: Recipe, rank: int, ranks: list[Counted]) -> int:
    """Sums the formula over the sub-blocks with experts."""
    number = 2 if case.train.precision == "bf16" else 4
    traffic_of = ExpertTraffic(case.model, case.parallel, number)
    group = ranks[rank].group
    assert len(group) == traffic_of.ranks
    return sum(
        traffic_of.bytes_sent(group.index(rank), [ranks[other].loads[t] for other in group])
        for t in range(len(ranks[rank].loads))
    )


@pytest.fixture(scope="module")
def by_size(ranks2: Ranks, ranks4: Ranks) -> dict[int, list[dict[str, Counted]]]:
    """What every rank has sent, by the number of ranks."""
    return {ranks.size: ranks.run(counted) for ranks in (ranks2, ranks4)}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_send_what_the_formulas_say(
    by_size: dict[int, list[dict[str, Counted]]], size: int
) -> None:
    """And nothing twice: four all-to-alls of rows for each mixture, and one of their numbers."""
    by_rank = by_size[size]
    assert by_rank[0].keys() == {name for name, (ranks, *_) in CASES.items() if ranks == size}
    for name in by_rank[0]:
        case, ranks = recipe(name), [of_rank[name] for of_rank in by_rank]
        blocks = case.model.symbols.count("E") + case.model.symbols.count("T")
        for rank, sent in enumerate(ranks):
            assert sent.collectives == (4 * blocks, blocks), name
            assert sent.bytes == formula(case, rank, ranks), name


def test_tokens_are_sent_once(by_size: dict[int, list[dict[str, Counted]]]) -> None:
    """All choices leave one rank once, and those that a capacity drops none."""
    by_rank = [*by_size[2], *by_size[4]]
    choices = ROWS * TOKENS * 2
    for name, copies in (("ep 4", 1), ("ep 2, etp 2, tp 2", 1), ("ep 2, tp 2, etp 1", 2)):
        ranks = [of_rank[name] for of_rank in by_rank if name in of_rank]
        assert [sum(of_rank.loads[0]) for of_rank in ranks] == [choices // copies] * len(ranks)
    assert any(0 < sum(of_rank["capacity"].loads[0]) < choices for of_rank in by_rank[2:])


def test_formula_of_even_loads() -> None:
    """It is T k D (n - 1) / n numbers, four times, and equals the formula of such loads."""
    for name, (_, layout, _, _) in CASES.items():
        case = recipe(name)
        traffic_of = ExpertTraffic(case.model, case.parallel, 4)
        shares = traffic_of.parallel.tp if traffic_of.shares_tokens else 1
        tokens = ROWS * TOKENS
        loads = [[tokens // shares * 2 // EXPERTS] * EXPERTS] * traffic_of.ranks
        even = traffic_of.even_bytes(tokens, choices=2)
        assert [traffic_of.bytes_sent(r, loads) for r in range(traffic_of.ranks)] == [
            even
        ] * traffic_of.ranks, layout
    four = ExpertTraffic(recipe("ep 4").model, ParallelConfig(ep=4), 4)
    assert four.even_bytes(32, 2) == 4 * (32 * 2 * 12 * 3 // 4) * 4 + 8 * 2 * 3


def test_formulas_of_two_ranks_by_hand() -> None:
    """Rank 0 sends 3 rows of its 5 to rank 1, which sends it 1 of its 4; 24 bytes a row."""
    model = ModelConfig(pattern="E", hidden=6, experts=4, vocab=2)
    two = ExpertTraffic(model, ParallelConfig(ep=2), 4)
    loads = [[2, 0, 1, 2], [0, 1, 3, 0]]
    assert two.rows_by_rank(loads[0]) == [2, 3]
    counts = 2 * 8  # of the two experts of the other rank
    assert two.bytes_sent(0, loads) == two.bytes_sent(1, loads) == 24 * 2 * (3 + 1) + counts
    both = ExpertTraffic(model, ParallelConfig(ep=1, etp=2), 4)  # each row goes to both
    assert both.rows_by_rank(loads[0]) == [5, 5]
    assert both.bytes_sent(0, loads) == 24 * 2 * (5 + 4) + 4 * 8
