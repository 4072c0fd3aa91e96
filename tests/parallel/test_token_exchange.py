"""The exchange of tokens against one device: shares, and dispatch with combine on ranks as threads.

The types of tests/typed/experts.py are stated; these tests show that the functions compute so.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equal import assert_equal
from spmd_types import P, S
from test_types import drawn
from torch import Tensor
from typed.types import joined

from colonnade.kernels.experts import expert_mlp
from colonnade.models.blocks.experts import Routed, local_combine, local_dispatch
from colonnade.models.seams import identity
from colonnade.parallel import experts
from colonnade.parallel.experts import TokenExchange

RANKS = 4


def test_shares() -> None:
    """`local_tokens` makes shards, and `all_tokens` partial sums of what was sharded; 21 tokens do
    not divide over 2 ranks."""
    x, ranks = drawn(7, 3, 2), [TokenExchange(dist.group.WORLD, 1, 2, rank) for rank in range(2)]
    one, two = (rank.local_tokens(x) for rank in ranks)
    assert_equal({"x": joined((one, two), S(0))}, {"x": x.flatten(0, 1)})
    back = ranks[0].all_tokens(one, 7, 3), ranks[1].all_tokens(two, 7, 3)
    assert_equal({"x": joined(back, P)}, {"x": x})


EXPERTS = 4
X, WEIGHT, UP, DOWN = drawn(8, 2, 3), drawn(8, 2, 2), drawn(EXPERTS, 8, 3), drawn(EXPERTS, 3, 8)
CHOSEN = drawn(8, 2, EXPERTS).topk(2, -1).indices
KEEP = drawn(8, 2, 2) > -0.5


def mixed(dispatch: Any, combine: Any, shard: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Dispatches a rank's tokens, runs its experts and combines; `shard` slices both."""
    x, weight = (shard(t, "tokens", 0).requires_grad_() for t in (X, WEIGHT))
    chosen, keep_mask = (shard(t, "tokens", 0) for t in (CHOSEN, KEEP))
    up, down = (
        shard(shard(t, "ep", 0), "etp", dim).requires_grad_() for t, dim in ((UP, 1), (DOWN, 2))
    )
    sent = dispatch(Routed(x, chosen, keep_mask, weight), EXPERTS)
    rows, counts = sent.receive()
    outputs = expert_mlp(rows, counts, None, up, down, "relu2")
    returned = combine(outputs, sent, weight)
    y = returned.receive(returned.rows)
    y.square().sum().backward()
    kept = int(counts.sum())
    results = dict(rows=rows[:kept], counts=counts.double(), outputs=outputs[:kept], y=y)
    results |= dict(dx=x.grad, dweight=weight.grad, dup=up.grad, ddown=down.grad)
    return {name: t.detach() for name, t in results.items()}


class Threads:
    """All-to-alls between threads, one for each rank, whose group has the rank as its name."""

    def __init__(self) -> None:
        self.barrier, self.sent = threading.Barrier(RANKS, timeout=60), dict[int, Any]()

    def all_to_all_single(
        self, t: Tensor, sizes: list[int], sent_sizes: list[int], rank: int
    ) -> Tensor:
        self.sent[rank] = t.split(sent_sizes)
        self.barrier.wait()
        received = torch.cat([self.sent[source][rank] for source in range(RANKS)])
        self.barrier.wait()
        return received

    wait_tensor = staticmethod(identity)


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2), (1, 4)])
def test_exchange(monkeypatch: pytest.MonkeyPatch, ep: int, etp: int) -> None:
    """Along `ep` ranks have other rows; along `etp` they have the same, and their outputs are
    partial sums. The results for shards of tokens and of weights, joined, are those for all."""
    monkeypatch.setattr(experts, "c10d", Threads())

    def on_rank(rank: int) -> dict[str, Tensor]:
        group: Any = SimpleNamespace(size=lambda: RANKS, group_name=rank)
        places = {"tokens": (RANKS, rank), "ep": (ep, rank // etp), "etp": (etp, rank % etp)}

        def shard(t: Tensor, axis: str, dim: int) -> Tensor:
            count, index = places[axis]
            return t.chunk(count, dim)[index].clone()

        exchange = TokenExchange(group, etp, 1, 0)
        return mixed(exchange.dispatch, exchange.combine, shard)

    with ThreadPoolExecutor(RANKS) as pool:
        ranks = list(pool.map(on_rank, range(RANKS)))
    by_ep = [ranks[first : first + etp] for first in range(0, RANKS, etp)]
    for same in by_ep:
        for rank in same:
            assert_equal({"rows": rank["rows"]}, {"rows": same[0]["rows"]})
    whole = {name: torch.cat([rank[name] for rank in ranks]) for name in ("y", "dx", "dweight")}
    whole |= {name: torch.cat([same[0][name] for same in by_ep]) for name in ("rows", "counts")}
    whole["outputs"] = torch.cat([sum(rank["outputs"] for rank in same) for same in by_ep])
    for name, dim in ("dup", 1), ("ddown", 2):
        whole[name] = torch.cat([torch.cat([rank[name] for rank in r], dim) for r in by_ep])
    assert_equal(whole, mixed(local_dispatch, local_combine, lambda t, *place: t.clone()))
