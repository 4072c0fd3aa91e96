"""What rounding alone does to a trace: one process again, its weights moved by part of an ulp."""

from functools import partial

import torch
from torch import Generator

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify.equal import compare
from colonnade.launcher.verify.shrink import alone
from colonnade.launcher.verify.trace import KINDS, traced
from colonnade.models.decoder import Decoder
from colonnade.parallel.world import World

ULP = {"fp64": 2.0**-52, "fp32": 2.0**-23}  # distance from 1 to the next number
DRAWS = 4

Noise = dict[str, dict[str, float]]  # by kind and name of a tensor


def noise(small: Recipe, precision: str, here: World) -> Noise:
    """How far a shrunk recipe's tensors move in one process when its weights move by an ulp.

    At the start of every step every weight w becomes w (1 + ulp · u), u uniform in [-1, 1], with
    the ulp of `precision`; all arithmetic is in fp64 on the CPU. So this measures how strongly the
    recipe itself amplifies rounding, and nothing of the layout, the kernels or the device that are
    under test.

    Args:
        small: the recipe at test size.
        precision: `fp64` or `fp32`.
        here: the world of one process.

    Returns:
        for every tensor of a trace the largest change of an element in any of `DRAWS` draws;
        infinite where one is not finite.
    """
    recipe = alone(small)
    exact = traced(recipe, here)
    found: Noise = {kind: {} for kind in KINDS}
    for draw in range(DRAWS):
        moved = traced(recipe, here, exact.parameters, partial(move, ULP[precision], draw))
        for kind, largest in found.items():
            for d in compare(getattr(moved, kind), getattr(exact, kind)):
                largest[d.name] = max(d.difference, largest.get(d.name, 0.0))
    return found


@torch.no_grad()
def move(ulp: float, draw: int, model: Decoder, step: int) -> None:
    """Multiply every weight by 1 + ulp · u, u uniform in [-1, 1]."""
    generator = Generator().manual_seed(1000 * draw + step)
    for p in model.parameters():
        u = torch.rand(p.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        p.mul_(u.mul_(ulp).add_(1))
