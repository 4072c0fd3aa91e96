"""AdamW (arXiv:1711.05101, algorithm 2): PyTorch's fused one, a parameter group for each rate and
decay. It communicates nothing: shards are updated where they are."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from colonnade.models.parameter_module import Declared, trained
from colonnade.models.parameters import ParameterSpec
from colonnade.parallel.gradients import scale_gradients
from colonnade.parallel.optimizer.base import Optimizer, OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def rate_and_decay(spec: ParameterSpec, settings: OptimizerSettings) -> tuple[float, float]:
    """Returns the factor of a parameter's learning rate, and its weight decay.

    AdamW multiplies its weight decay by the learning rate; where muP lowers the rate, the decay is
    raised, so that their product stays the same (arXiv:2203.03466, appendix B.3).
    """
    return spec.rate, settings.weight_decay / spec.rate if spec.decayed else 0.0


class AdamW(Optimizer):
    """AdamW on all parameters of a model that are not frozen, or on the given ones."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        parameters: Iterable[Declared] | None = None,
    ) -> None:
        super().__init__()
        self.named = list(trained(model) if parameters is None else parameters)
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        if not self.named:  # a stage of a pipeline may be frozen, and PyTorch's has some parameter
            groups[1.0, 0.0] = []
        for _, parameter, spec in self.named:
            groups[rate_and_decay(spec, settings)].append(parameter)
        self.torch = torch.optim.AdamW(
            [
                {"params": members, "rate": rate, "weight_decay": decay}
                for (rate, decay), members in sorted(groups.items(), key=lambda g: g[0])
            ],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        for _, p, _ in self.named:
            self.torch.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                **{moment: torch.zeros_like(p) for moment in MOMENTS},
            }

    def update(self, lr: float, scale: float) -> None:
        scale_gradients((p for _, p, _ in self.named), scale)
        for group in self.torch.param_groups:
            group["lr"] = lr * group["rate"]
        self.torch.step()

    def zero_grad(self) -> None:
        self.torch.zero_grad()

    def named_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{moment}": self.torch.state[p][moment]
            for name, p, _ in self.named
            for moment in MOMENTS
        }

    def resume(self, updates: int, before: Mapping[str, int]) -> None:
        super().resume(updates, before)
        for name, p, _ in self.named:
            self.torch.state[p]["step"].fill_(updates - before.get(name, 0))
