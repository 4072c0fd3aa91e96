"""Measures how far rounding alone moves a trace: one process, its weights moved by an ulp."""

from functools import partial

import torch
from torch import Generator

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify.equal import compare
from colonnade.launcher.verify.shrink import in_one_process
from colonnade.launcher.verify.trace import KINDS, record_trace
from colonnade.models.decoder import Decoder
from colonnade.parallel.world import World

ULP = {"fp64": 2.0**-52, "fp32": 2.0**-23}  # distance from 1 to the next number
DRAWS = 4

Noise = dict[str, dict[str, float]]  # by kind and name of a tensor


def measure_noise(
    small: Recipe, precision: str, world: World, residual: str | None = None
) -> Noise:
    """Measures how far the tensors of a trace move when all weights move by up to an ulp.

    At the start of every step every weight w becomes w (1 + ulp · u), u uniform in [-1, 1], with
    the ulp of `precision`; all arithmetic is in fp64 in one process on the CPU. So this measures
    how strongly the recipe itself amplifies rounding; the layout, the kernels and the device under
    test have no influence on it.

    Args:
        small: the recipe at test size.
        precision: `fp64` or `fp32`.
        world: a world of one process, on the CPU.
        residual: the residual wiring; None: the recipe's.

    Returns:
        for every tensor of a trace the largest change of an element in any of `DRAWS` draws;
        infinite where an element is not finite.
    """
    recipe = in_one_process(small, residual)
    exact = record_trace(recipe, world)
    noise: Noise = {kind: {} for kind in KINDS}
    for draw in range(DRAWS):
        change = partial(move_weights, ULP[precision], draw)
        moved = record_trace(recipe, world, exact.parameters, change)
        for kind, largest in noise.items():
            for d in compare(getattr(moved, kind), getattr(exact, kind)):
                largest[d.name] = max(d.difference, largest.get(d.name, 0.0))
    return noise


@torch.no_grad()
def move_weights(ulp: float, draw: int, model: Decoder, step: int) -> None:
    """Multiplies every weight by 1 + ulp · u, u uniform in [-1, 1], seeded by draw and step."""
    generator = Generator().manual_seed(1000 * draw + step)
    for p in model.parameters():
        u = torch.rand(p.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        p.mul_(u.mul_(ulp).add_(1))
