"""`bench mup`: a coordinate check of muP beside the standard parametrisation, with a plot.

Models of several widths take a few steps of Adam on the same text. Under muP (arXiv:2203.03466)
the change that these steps make in the outputs of sub-blocks neither grows nor vanishes with width;
under the standard parametrisation it grows. (The change of the logits falls with width at first:
the share of it that passes through the head's initial weights falls, until the learned share
outweighs it.) A sweep of learning rates at two widths shows the use of that: the best learning rate
stays the same.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade.bench import require_packages
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import OptimizerConfig
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.materialise import materialise
from colonnade.parallel.optimizer import Optimizer, build_optimizer
from colonnade.parallel.passes import evaluating

PATTERN = "*-MmGE"
SWEEP_PATTERN = "*-*-"
PARAMETRISATIONS = ("standard", "muP")
LR = 2**-9  # of the coordinate check
RATES = tuple(2.0**-n for n in range(11, 4, -1))  # of the sweep
S, B, VOCAB = 64, 8, 256  # tokens per row, rows, vocabulary: bytes

Changes = dict[int, dict[str, list[float]]]  # by width, output and step


def model_config(pattern: str, width: int, base: int | None) -> ModelConfig:
    """The config of a model all of whose widths grow with `width`.

    Attention, Mamba and DeltaNet get more heads, experts a larger inner width.

    Args:
        base: the width of muP's base model; None: the standard parametrisation.
    """

    def widths(n: int) -> dict[str, int]:
        heads = {f"{mixer}_heads": n // 16 for mixer in ("mamba", "delta")}
        return {"hidden": n, "ffn": 2 * n, "expert_ffn": n, "heads": n // 16, **heads}

    return ModelConfig.model_validate(
        dict(
            pattern=pattern, vocab=VOCAB, experts=4, init_std=0.08, mamba_head_dim=16,
            mamba_state=16, mamba_chunk=32, delta_key_dim=16, delta_chunk=32,
            mup_base=None if base is None else widths(base), **widths(width),
        )
    )  # fmt: skip


def initialised_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model with its initial weights."""
    with torch.device("meta"):
        model = Decoder(config)
    materialise(model, torch.device("cpu"), seed)
    return model


def random_batches(count: int) -> Tensor:
    """Bytes of one file of the standard library from random offsets, `[count, S + 1, B]`."""
    data = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - S, (count, 1, B), generator=generator)
    return data[starts + torch.arange(S + 1)[:, None]].long()


def step(model: Decoder, optimizer: Optimizer, lr: float, rows: Tensor) -> float:
    """Trains one step on rows `[S + 1, B]`; returns the loss before it, in nats per byte."""
    loss = model(rows[:-1], context(), rows[1:])[0] / rows[1:].numel()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(lr)
    return loss.item()


def context() -> Context:
    """The context of rows that hold one document each."""
    return Context(torch.arange(S)[:, None].expand(S, B))


def outputs(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """The output that every sub-block adds to the stream, and the logits, by name."""
    captured: dict[str, Tensor] = {}

    def capture(name: str, block: SubBlock) -> Any:
        return lambda module, args, output: captured.__setitem__(name, block.receive(output))

    handles = []
    for t, symbol in enumerate(model.config.symbols):
        block = model.wiring.block(t)
        name = f"{t} {CARDS[symbol].title}"
        handles.append(block.second.register_forward_hook(capture(name, block)))
    with evaluating(model):
        captured["logits"] = model(tokens, context())
    for handle in handles:
        handle.remove()
    return captured


def coordinates(pattern: str, widths: Sequence[int], base: int | None, steps: int) -> Changes:
    """Mean absolute change of every output since the start, by width, after each step."""
    rows = random_batches(1)[0]
    changes: Changes = {}
    for width in widths:
        model = initialised_model(model_config(pattern, width, base))
        optimizer = build_optimizer(model, OptimizerConfig())
        before = outputs(model, rows[:-1])
        by_output: dict[str, list[float]] = {name: [] for name in before}
        for _ in range(steps):
            step(model, optimizer, LR, rows)
            for name, after in outputs(model, rows[:-1]).items():
                by_output[name].append((after - before[name]).abs().mean().item())
        changes[width] = by_output
    return changes


def slopes(changes: Changes) -> dict[str, float]:
    """Exponent of width in every output's change after the last step, by least squares."""
    x = torch.tensor(list(changes), dtype=torch.float64).log()
    x = x - x.mean()
    exponents = {}
    for name in next(iter(changes.values())):
        last = [changes[width][name][-1] for width in changes]
        y = torch.tensor(last, dtype=torch.float64).log()
        exponents[name] = float((x * y).sum() / x.square().sum())
    return exponents


def sweep(width: int, base: int | None, rates: Sequence[float], steps: int) -> dict[float, float]:
    """Mean loss of the last quarter of the steps, by learning rate."""
    batches, losses = random_batches(steps), {}
    for rate in rates:
        model = initialised_model(model_config(SWEEP_PATTERN, width, base))
        optimizer = build_optimizer(model, OptimizerConfig())
        seen = [step(model, optimizer, rate, rows) for rows in batches]
        last = seen[-max(1, steps // 4) :]
        losses[rate] = sum(last) / len(last)
    return losses


def plot_changes(changes_by_kind: dict[str, Changes], path: Path) -> None:
    """Plots change over width: a panel per parametrisation, a line per output and step.

    Steps before the last are faint.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (kind, changes) in zip(panels, changes_by_kind.items(), strict=True):
        widths = list(changes)
        for color_index, (name, by_step) in enumerate(changes[widths[0]].items()):
            for step_index in range(len(by_step)):
                last = step_index == len(by_step) - 1
                panel.plot(
                    widths,
                    [changes[width][name][step_index] for width in widths],
                    color=f"C{color_index}",
                    alpha=1.0 if last else 0.2,
                    marker="o" if last else None,
                    label=name if last else None,
                )
        panel.set(title=kind, xlabel="width", xscale="log", yscale="log")
        panel.set_xticks(widths, [str(width) for width in widths], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean absolute change since the start")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(
    widths: Sequence[int] = (64, 128, 256, 512),
    steps: int = 10,
    sweep_widths: Sequence[int] = (64, 256),
    rates: Sequence[float] = RATES,
    sweep_steps: int = 60,
    plot: Path = Path("mup.png"),
) -> dict[str, Any]:
    """Changes, their slopes over width, the plot, and losses by learning rate.

    Args:
        widths: multiples of 16, growing; the first is muP's base.
        steps: of Adam in the coordinate check.
        sweep_widths: widths of the sweep, the first muP's base; if empty, there is no sweep.
        rates: learning rates of the sweep.
        sweep_steps: steps at each learning rate.
        plot: where the plot is written.

    Raises:
        UserError: matplotlib is not installed, or the plot cannot be written.
    """
    require_packages("mup", "matplotlib")
    changes_by_kind = {
        kind: coordinates(PATTERN, widths, None if kind == "standard" else widths[0], steps)
        for kind in PARAMETRISATIONS
    }
    try:
        plot_changes(changes_by_kind, plot)
    except OSError as error:
        raise UserError(f"bench mup: cannot write {plot}: {error.strerror}") from error
    report: dict[str, Any] = {
        "shape": f"{PATTERN}, widths {', '.join(map(str, widths))}, {S} bytes, batch {B}, fp32",
        "steps": f"{steps} of AdamW at {LR:.4g}",
        "plot": str(plot),
    }
    for kind, changes in changes_by_kind.items():
        for name, slope in slopes(changes).items():
            report[f"{kind}, {name}: slope of change over width"] = slope
            for step_index in sorted({0, steps - 1}):
                report[f"{kind}, {name}: change after step {step_index + 1}"] = ", ".join(
                    f"{changes[width][name][step_index]:.3g}" for width in widths
                )
    for kind in PARAMETRISATIONS:
        for width in sweep_widths:
            base = None if kind == "standard" else sweep_widths[0]
            losses = sweep(width, base, rates, sweep_steps)
            report[f"{kind}, width {width}: loss by learning rate"] = ", ".join(
                f"{rate:.2g}: {loss:.3f}" for rate, loss in losses.items()
            )
            report[f"{kind}, width {width}: best learning rate"] = min(
                losses, key=losses.__getitem__
            )
    return report
