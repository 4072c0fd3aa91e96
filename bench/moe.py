"""`bench moe`: our mixture of experts beside transformers' Mixtral block, a loop over experts.

With --nproc the experts are divided among ranks, and `moe_ranks` runs instead.

Forward and backward of the sub-block with its router and without balancing losses, on the same
weights and tokens, in alternation. The floor is PyTorch's matrix products of the experts only, with
an equal share of the rows for each expert.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from colonnade.bench import require_packages
from colonnade.bench.timing import alternate, median_ratio
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.context import Context

EXPERTS, TOP_K = 8, 2
SIZES = ((2048, 256, 512), (512, 256, 512), (2048, 512, 1408), (8192, 128, 256))  # T, D, F
STD = 0.05


def colonnade_block(D: int, F: int, capacity: float | None) -> SubBlock:
    """Our `E` sub-block with random weights."""
    config = ModelConfig(
        pattern="E", hidden=D, ffn=F, experts=EXPERTS, top_k=TOP_K, capacity=capacity, balance=0.0
    )
    block = CARDS["E"].build(config, STD)
    generator = torch.Generator().manual_seed(0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=STD, generator=generator)
    return block


def mixtral_block(weights: dict[str, Tensor], D: int, F: int) -> torch.nn.Module:
    """transformers' MixtralSparseMoeBlock with the weights of our sub-block, by parameter name."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation="eager",  # type: ignore[call-arg]  # an argument of its base class
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
    """The products with gate, up and down of every expert on T k / E rows, and both gradients."""
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
    """One size: milliseconds of each, ratios, and the difference of the two blocks' outputs."""
    x = torch.randn(T, 1, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    positions = torch.arange(T)[:, None]
    ours = {"ours": colonnade_block(D, F, None), "capacity 1.0": colonnade_block(D, F, 1.0)}
    mixtral = mixtral_block(dict(ours["ours"].named_parameters()), D, F)
    mixtral.train()

    def forward(block: SubBlock) -> Tensor:
        context = Context(positions)
        return block(x, context)

    outputs: dict[str, Callable[[], Tensor]] = {
        **{name: lambda block=block: forward(block) for name, block in ours.items()},  # type: ignore[misc]
        "transformers": lambda: mixtral(x.transpose(0, 1)).transpose(0, 1),
    }
    modules: dict[str, torch.nn.Module] = {**ours, "transformers": mixtral}
    grad = torch.randn(T, 1, D)

    def forward_backward(name: str) -> Callable[[], object]:
        inputs = [x, *modules[name].parameters()]
        return lambda: torch.autograd.grad(outputs[name](), inputs, grad)

    seconds = alternate(
        {**{name: forward_backward(name) for name in outputs}, "floor": floor_step(T, D, F)},
        rounds,
        warmup=2,
    )
    with torch.no_grad():
        expected = outputs["transformers"]()
        difference = (outputs["ours"]() - expected).abs().max() / expected.abs().max()
    keep_mask = ours["capacity 1.0"].begin(x, Context(positions)).sent.order.keep_mask
    size = f"T={T} D={D} F={F}"
    return {
        **{f"{size}: {n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()},
        **{
            f"{size}: speed, {n} / transformers": median_ratio(seconds["transformers"], seconds[n])
            for n in ("ours", "capacity 1.0", "floor")
        },
        f"{size}: choices dropped at capacity 1.0": 1 - keep_mask.float().mean().item(),
        f"{size}: largest difference of ours from transformers": float(difference),
    }


def run(sizes: Sequence[tuple[int, int, int]] = SIZES, rounds: int = 15) -> dict[str, Any]:
    """Times, ratios and floors at several sizes (tokens, hidden, inner width of an expert).

    Raises:
        UserError: transformers is not installed.
    """
    require_packages("moe", "transformers")
    report: dict[str, Any] = {
        "shape": f"{EXPERTS} experts, top {TOP_K}, fp32, forward and backward",
        "threads": torch.get_num_threads(),
    }
    for T, D, F in sizes:
        report |= compare(T, D, F, rounds)
    return report
