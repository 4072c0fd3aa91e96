"""σReparam folded into plain weights: γ W / σ(W), as the model computes it in evaluation."""

import torch
from torch import Tensor

from colonnade.kernels.sharding import UNSHARDED
from colonnade.launcher.convert.huggingface.family import shapes_of
from colonnade.launcher.weights.source import Box, Weights, whole_box
from colonnade.models.reparam import INITIAL_ITERATIONS, power_iteration


class Folded(Weights):
    """Weights of the plain model that computes what a model under σReparam does.

    A matrix is read a second time for σ, which is computed matrix by matrix, of stacked experts
    one at a time.

    Args:
        weights: under σReparam.
        dtype: in which a weight is scaled, unless it is wider.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        self.weights, self.scaled = weights, dtype
        self.folder = weights.folder
        self.config = weights.config.changed(sigma_reparam=False)
        self.shapes = shapes_of(self.config)
        self.factors: dict[tuple[str, int], Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def read(self, name: str, box: Box) -> Tensor:
        weight = self.weights.read(name, box)
        if f"{name}_gain" not in self.weights.shapes:
            return weight
        wide = weight.to(torch.promote_types(weight.dtype, self.scaled))
        of_experts = range(box[0].start, box[0].stop) if wide.dim() == 3 else range(1)
        factors = torch.stack([self.factor(name, expert) for expert in of_experts])
        return wide * factors.to(wide.dtype).view(-1, *(1,) * (wide.dim() - 1))

    def factor(self, name: str, expert: int) -> Tensor:
        """Returns γ / σ of a matrix, in fp64; the first singular vectors where none are stored."""
        if (name, expert) not in self.factors:
            weight = self.of_expert(name, expert, 2)
            gain = 1 + self.weights.read(f"{name}_gain", (slice(expert, expert + 1),)).double()[0]
            left = self.of_expert(f"{name}_left", expert, 1).double()
            right = self.of_expert(f"{name}_right", expert, 1).double()
            if not bool(self.weights.whole(f"{name}_left").any()):
                right = torch.full_like(right, right.shape[0] ** -0.5)
                power_iteration(
                    weight.double(), left, right, UNSHARDED, UNSHARDED, INITIAL_ITERATIONS
                )
            rows = torch.cat([part.double() @ right for part in weight.split(1024)])
            self.factors[name, expert] = gain / (left @ rows)
        return self.factors[name, expert]

    def of_expert(self, name: str, expert: int, dims: int) -> Tensor:
        """Returns the last dimensions of a tensor, of one expert where experts are stacked."""
        shape = self.weights.shapes[name]
        if len(shape) == dims:
            return self.weights.whole(name)
        box = whole_box(shape)
        return self.weights.read(name, (slice(expert, expert + 1), *box[1:]))[0]
