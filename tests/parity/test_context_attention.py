"""Attention over a sequence that a context group shards, against one device with all of it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from equal import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from colonnade.kernels import tiles
from colonnade.kernels.attention import attention_reference
from colonnade.kernels.tiles import ScoreOptions
from colonnade.parallel.context.attention import context_attention
from colonnade.parallel.context.layout import SequenceSharding

S, B, P, V = 48, 2, 5, 7
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "cap": {"cap": 1.3},
    "sinks": {"sinks": True},
    "clip": {"clip": (-0.02, 1.1)},
    "all": {"cap": 1.3, "sinks": True, "clip": (-0.01, 1.2)},
}
PACKED = (5, 1, 17, 20, 5), (12, 24, 12)  # documents' lengths by row; one ends where a segment does


def documents(*rows: Any) -> Tensor:
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows], 1)


def tensors(heads: int, kv_heads: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "q": 1.5 * normal(S, B, heads, P), "k": 1.5 * normal(S, B, kv_heads, P),
        "v": normal(S, B, kv_heads, V), "sinks": normal(heads), "grad": normal(S, B, heads, V),
    }  # fmt: skip


def on_one_device(
    named: dict[str, Tensor], rows: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients of the full score matrix."""
    leaves = {n: t.clone().requires_grad_() for n, t in named.items() if n != "grad"}
    if not options.pop("sinks", False):
        del leaves["sinks"]
    out = attention_reference(**leaves, documents=rows, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), named["grad"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def on_a_rank(
    rank: int, size: int, named: dict[str, Tensor], rows: Tensor | None, cases: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """Output and gradients of this rank's shard, for each case."""
    tiles.BLOCK = 4
    results = []
    for case in cases:
        options = dict(case)
        variant, zigzag = options.pop("variant"), options.pop("zigzag", True)
        sinks = options.pop("sinks", False)
        sharding = SequenceSharding(size, rank, zigzag)
        leaves = {n: sharding.shard(named[n]).requires_grad_() for n in "qkv"}
        if sinks:
            leaves["sinks"] = named["sinks"].clone().requires_grad_()
        score_options = ScoreOptions(
            P**-0.5, options.get("window"), options.get("cap"), options.get("clip")
        )
        group = dist.group.WORLD
        assert group is not None
        out = context_attention(
            leaves["q"], leaves["k"], leaves["v"], group, score_options=score_options,
            variant=variant, documents=rows, sinks=leaves.get("sinks"), zigzag=zigzag,
        )  # fmt: skip
        grads = torch.autograd.grad(out, list(leaves.values()), sharding.shard(named["grad"]))
        results.append({"out": out.detach(), **dict(zip(leaves, grads, strict=True))})
    return results


def joined(shards: list[dict[str, Tensor]], zigzag: bool) -> dict[str, Tensor]:
    """Joins all ranks' results to those of the full sequence; gradients of sinks are summed."""
    sharding = SequenceSharding(len(shards), 0, zigzag)
    by_name = {n: [shard[n] for shard in shards] for n in shards[0]}
    sinks = {"sinks": torch.stack(by_name.pop("sinks")).sum(0)} if "sinks" in by_name else {}
    return sinks | {
        n: sharding.in_sequence_order(torch.cat(of_ranks)) for n, of_ranks in by_name.items()
    }


def check(ranks: Ranks, named: dict[str, Tensor], rows: Tensor | None, cases: list[Any]) -> None:
    results = ranks.run(on_a_rank, named, rows, cases)
    for i, case in enumerate(cases):
        options = {n: o for n, o in case.items() if n not in ("variant", "zigzag")}
        ours = joined([of_rank[i] for of_rank in results], case.get("zigzag", True))
        assert_equal(ours, on_one_device(named, rows, **options))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["ring", "allgather"])
def test_equal_to_one_device(
    ranks2: Ranks, ranks4: Ranks, variant: str, packed: bool, option: str
) -> None:
    """With windows that end within a segment, at its end, and beyond the next ones.

    Over all options, each variant has every window with and without the zigzag, on both numbers of
    ranks, and these have both numbers of heads.
    """
    rows = documents(*PACKED) if packed else None
    number = list(OPTIONS).index(option) + packed
    cases = [
        {"variant": variant, "window": window, "zigzag": (n + number) % 2 == 0, **OPTIONS[option]}
        for n, window in enumerate((None, 1, 4, 7, 13, 30))
    ]
    heads = ((4, 2), (3, 3))
    for n, ranks in enumerate((ranks2, ranks4)):
        check(ranks, tensors(*heads[(n + number // 2) % 2]), rows, cases)


@given(boundaries=st.lists(st.integers(1, S - 1), max_size=8), seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_packing(ranks4: Ranks, boundaries: list[int], seed: int) -> None:
    ends = [*sorted({*boundaries}), S]
    lengths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    rows = documents(lengths, lengths)
    cases = [
        {"variant": variant, "window": w} for variant in ("ring", "allgather") for w in (None, 9)
    ]
    check(ranks4, tensors(4, 2, seed), rows, cases)


def sent_around(t: Tensor, rank: int, size: int) -> list[Tensor]:
    """Every rank's tensor, by rank, each received from the previous rank by send/recv."""
    received = {rank: t.contiguous()}
    for step in range(1, size):
        incoming = torch.empty_like(t)
        outgoing = received[(rank - step + 1) % size]
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, outgoing, (rank + 1) % size),
             dist.P2POp(dist.irecv, incoming, (rank - 1) % size)]
        ):  # fmt: skip
            work.wait()
        received[(rank - step) % size] = incoming
    return [received[r] for r in range(size)]


def ring_self_attention(rank: int, size: int, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """As published (arXiv:2105.13120, section 3): K goes around the ring to make full rows of
    scores, whose softmax multiplies V as it goes around; gradients of K and V are all-reduced."""
    n = S // size
    local = slice(rank * n, (rank + 1) * n)
    q, grad = named["q"][local].clone().requires_grad_(), named["grad"][local]
    k, v = (
        [t.clone().requires_grad_() for t in sent_around(named[name][local], rank, size)]
        for name in "kv"
    )
    repeat = q.shape[2] // k[0].shape[2]
    scores = torch.cat(
        [torch.einsum("sbhp,tbhp->bhst", q, t.repeat_interleave(repeat, 2)) for t in k], -1
    )
    hidden = torch.arange(S) > torch.arange(S)[local][:, None]
    rows = (scores * P**-0.5).masked_fill(hidden, -torch.inf).softmax(-1).chunk(size, -1)
    partial = [
        torch.einsum("bhst,tbhp->sbhp", row, t.repeat_interleave(repeat, 2))
        for row, t in zip(rows, v, strict=True)
    ]
    out = torch.stack(partial).sum(0)
    dq, *dkv = torch.autograd.grad(out, [q, *k, *v], grad)
    for total in dkv:
        dist.all_reduce(total)
    return {"out": out.detach(), "q": dq, "k": dkv[rank], "v": dkv[size + rank]}


def test_equal_to_ring_self_attention(ranks2: Ranks, ranks4: Ranks) -> None:
    """On its sharding, one segment for each rank."""
    named = tensors(4, 2)
    cases = [{"variant": variant, "zigzag": False} for variant in ("ring", "allgather")]
    for ranks in (ranks2, ranks4):
        published = joined(ranks.run(ring_self_attention, named), False)
        for of_case in zip(*ranks.run(on_a_rank, named, None, cases), strict=True):
            assert_equal(joined([*of_case], False), published)


def on_a_rank_in_bf16(
    rank: int, size: int, named: dict[str, Tensor], variant: str
) -> dict[str, Tensor]:
    sharding = SequenceSharding(size, rank)
    leaves = [sharding.shard(named[n]).bfloat16().requires_grad_() for n in "qkv"]
    group = dist.group.WORLD
    assert group is not None
    out = context_attention(*leaves, group, score_options=ScoreOptions(P**-0.5), variant=variant)
    grads = torch.autograd.grad(out, leaves, sharding.shard(named["grad"]).bfloat16())
    return {"out": out.detach(), **dict(zip("qkv", grads, strict=True))}


@pytest.mark.parametrize("variant", ["ring", "allgather"])
def test_bf16(ranks4: Ranks, variant: str) -> None:
    """Outputs of tiles are bf16 and merged in fp32, as are gradients: each rounds by 2^-9."""
    named = {n: t.bfloat16().double() for n, t in tensors(4, 2).items()}
    ours = joined(ranks4.run(on_a_rank_in_bf16, named, variant), True)
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    assert_equal(ours, on_one_device(named, None), 2.0**-6, of_all=0.0)
