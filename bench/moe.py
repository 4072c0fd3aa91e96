"""`bench moe`: our mixture of experts beside transformers' Mixtral block, a loop over experts.

Forward and backward of the whole sub-block, router included and losses left out, same weights, same
tokens, in alternation. The floor is the experts' products alone, as PyTorch has them, every expert
with its fair share of the rows.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from colonnade.bench import need
from colonnade.bench.timing import alternate, median_ratio
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.context import Context

EXPERTS, TOP_K = 8, 2
SIZES = ((2048, 256, 512), (512, 256, 512), (2048, 512, 1408), (8192, 128, 256))  # T, D, F
STD = 0.05


def our_block(D: int, F: int, capacity: float | None) -> SubBlock:
    """The `E` sub-block with random weights."""
    config = ModelConfig(
        pattern="E", hidden=D, ffn=F, experts=EXPERTS, top_k=TOP_K, capacity=capacity, balance=0.0
    )
    block = CARDS["E"].build(config, STD)
    generator = torch.Generator().manual_seed(0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=STD, generator=generator)
    return block


def their_block(weights: dict[str, Tensor], D: int, F: int) -> torch.nn.Module:
    """MixtralSparseMoeBlock with these weights of ours."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation="eager",  # type: ignore[call-arg]  # taken by its base class
    )
    block = MixtralSparseMoeBlock(config)
    gate, up = weights["gate"], weights["up"]
    block.load_state_dict(
        {
            "gate.weight": weights["router"],
            "experts.gate_up_proj": torch.cat([gate, up], dim=1),
            "experts.down_proj": weights["down"],
        }
    )
    return block


def floor_step(T: int, D: int, F: int) -> Callable[[], None]:
    """Gate, up and down of every expert with T k / E rows, and both gradients of each."""
    rows = T * TOP_K // EXPERTS
    shapes = [(D, F), (D, F), (F, D)] * EXPERTS
    products = [(torch.randn(rows, i), torch.randn(o, i), torch.randn(rows, o)) for i, o in shapes]

    def step() -> None:
        for x, w, dy in products:
            x @ w.T
            dy @ w
            dy.T @ x

    return step


def compare(T: int, D: int, F: int, rounds: int) -> dict[str, Any]:
    """One size: milliseconds of each, ratios, and how far the two blocks' outputs are apart."""
    x = torch.randn(T, 1, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    positions = torch.arange(T)[:, None]
    ours = {"ours": our_block(D, F, None), "capacity 1.0": our_block(D, F, 1.0)}
    theirs = their_block(dict(ours["ours"].named_parameters()), D, F)
    theirs.train()

    def mix(block: SubBlock) -> Tensor:
        context = Context(positions)
        return block.finish(block.begin(x, context), context)

    outputs: dict[str, Callable[[], Tensor]] = {
        **{name: lambda block=block: mix(block) for name, block in ours.items()},  # type: ignore[misc]
        "transformers": lambda: theirs(x.transpose(0, 1)).transpose(0, 1),
    }
    modules: dict[str, torch.nn.Module] = {**ours, "transformers": theirs}
    grad = torch.randn(T, 1, D)

    def both(name: str) -> Callable[[], object]:
        wanted = [x, *modules[name].parameters()]
        return lambda: torch.autograd.grad(outputs[name](), wanted, grad)

    seconds = alternate(
        {**{name: both(name) for name in outputs}, "floor": floor_step(T, D, F)}, rounds, warmup=2
    )
    with torch.no_grad():
        expected = outputs["transformers"]()
        apart = (outputs["ours"]() - expected).abs().max() / expected.abs().max()
    kept = ours["capacity 1.0"].begin(x, Context(positions)).order.keep_mask
    size = f"T={T} D={D} F={F}"
    return {
        **{f"{size}: {n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()},
        **{
            f"{size}: speed, {n} / transformers": median_ratio(seconds["transformers"], seconds[n])
            for n in ("ours", "capacity 1.0", "floor")
        },
        f"{size}: choices dropped at capacity 1.0": 1 - kept.float().mean().item(),
        f"{size}: largest difference of ours from transformers": float(apart),
    }


def run(sizes: Sequence[tuple[int, int, int]] = SIZES, rounds: int = 15) -> dict[str, Any]:
    """Times, ratios and floors at several sizes (tokens, hidden, inner width of an expert).

    Raises:
        UserError: transformers is not installed.
    """
    need("moe", "transformers")
    report: dict[str, Any] = {
        "shape": f"{EXPERTS} experts, top {TOP_K}, fp32, forward and backward",
        "threads": torch.get_num_threads(),
    }
    for T, D, F in sizes:
        report |= compare(T, D, F, rounds)
    return report
