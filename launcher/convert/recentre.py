"""From LayerNorm to RMSNorm on a centred stream, exactly (arXiv:2305.14858).

LayerNorm is RMSNorm of the input less its mean; where all that is written onto the stream has mean
zero, the stream has it too. CRMSNorm leaves out the last channel of such a stream, minus the sum of
the others, from the stream and from every weight that reads or writes it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from colonnade.models.config import ModelConfig
from colonnade.models.parameters import Role
from colonnade.models.records import records_of
from colonnade.models.reparam import centred

Weights = Mapping[str, Tensor]


def to_pre_rms(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function with `norm = "pre_rms"`. A tied head is untied: it was not centred.

    Raises:
        ValueError: the model is not one of LayerNorms in front of its sub-blocks alone.
    """
    check(config)
    made, roles = dict(weights), roles_of(config)
    if config.tied:
        made["head.weight"] = weights["embedding.weight"].clone()
    for name, role in roles.items():
        if role in ("writes", "table"):
            made[name] = centred(weights[name], -2 if role == "writes" else -1)
    return config.changed(norm="pre_rms", tied=False), made


def to_crms(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function with `norm = "crms"` and a stream narrower by one channel.

    The norms' weights go into what reads behind them and become 1.

    Raises:
        ValueError: as `to_pre_rms`; or the norms have biases, their weights are more than one for
            the same sub-block (`share`), a weight reads the stream in slices, or muP counts widths.
    """
    check(config)
    sliced = config.attention_gate if config.has("*") else "none"
    held = {
        "norm_bias": config.norm_bias,
        "share": config.share,
        "mup_base": config.mup_base,
        "attention_gate": sliced if sliced == "head" else None,
    }
    for field, value in held.items():
        if value:
            raise ValueError(f"model.{field} = {value}: CRMSNorm cannot hold it; pre_rms can")
    centred_config, made = to_pre_rms(config, weights)
    for name, role in roles_of(centred_config).items():
        weight = made[name]
        if role == "reads":
            gained = weight * weights[norm_before(name)]
            made[name] = gained[..., :-1] - gained[..., -1:]
        elif role == "writes":
            made[name] = weight[..., :-1, :]
        elif role == "table":
            made[name] = weight[..., :-1]
        elif is_stream_norm(name):
            made[name] = torch.ones_like(weight[:-1])
    return centred_config.explicit().changed(norm="crms", hidden=config.hidden - 1), made


def check(config: ModelConfig) -> None:
    """Only LayerNorms in front of sub-blocks: what a norm writes is not centred."""
    asked = {"norm": "layer", "norm_position": "before", "sigma_reparam": False, "mtp": 0}
    for field, wanted in asked.items():
        if (value := getattr(config, field)) != wanted:
            raise ValueError(f"model.{field} = {value}: this conversion starts from {wanted}")


def roles_of(config: ModelConfig) -> dict[str, Role]:
    """The role of every parameter, by its name."""
    return {name: record.role for name, record in records_of(config).items() if not record.state}


def is_stream_norm(name: str) -> bool:
    """Whether a parameter belongs to a norm of the stream, not to one inside a sub-block."""
    return name.startswith(("norms.", "final."))


def norm_before(name: str) -> str:
    """The norm whose output the weight `name` reads."""
    if name == "head.weight":
        return "final.weight"
    index = name.removeprefix("blocks.").split(".")[0]
    return f"norms.{index}.weight"
