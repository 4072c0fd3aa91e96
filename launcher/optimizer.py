"""AdamW over a sharded model, and its state as named tensors for checkpoints."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from colonnade.launcher.recipe import OptimizerConfig
from colonnade.models.part import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv:1711.05101, algorithm 2), a group per learning rate and decay.

    AdamW multiplies its decay by the learning rate; where muP lowers the rate, the decay rises, so
    that their product stays (arXiv:2203.03466, appendix B.3).
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for part in model.modules():
        if isinstance(part, Part):
            for name, p in part.named_parameters(recurse=False):
                spec = part.specs[name]
                groups[spec.rate, spec.decay].append(p)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "rate": rate,
                "lr": config.lr * rate,
                "weight_decay": config.weight_decay / rate if decayed else 0.0,
            }
            for (rate, decayed), parameters in sorted(groups.items(), key=lambda g: g[0])
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr`, times each group's own rate, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the zero moments that AdamW would make at its first step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                **{name: torch.zeros_like(p) for name in MOMENTS},
            }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the count of updates, on which AdamW's bias correction depends."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def updates_done(optimizer: torch.optim.Optimizer) -> int:
    """Updates so far; steps that were skipped do not count."""
    for state in optimizer.state.values():
        return int(state["step"])
    return 0


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `model.NAME`, and `optimizer.NAME.MOMENT`."""
    tensors: dict[str, Tensor] = {f"model.{name}": b for name, b in model.named_buffers()}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.data
        if optimizer is not None:
            for moment in MOMENTS:
                tensors[f"optimizer.{name}.{moment}"] = optimizer.state[p][moment]
    return tensors
