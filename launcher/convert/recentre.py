"""Converts LayerNorm to RMSNorm on a centred residual stream, exactly (arXiv:2305.14858).

LayerNorm is RMSNorm of the input minus its mean. If all outputs that are added to the stream have
mean zero, so has the stream, and both norms are equal. CRMSNorm omits the last channel of such a
stream, which equals minus the sum of the others, from the stream and from every weight that reads
or writes it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from colonnade.models.config import ModelConfig
from colonnade.models.parameters import ParameterSpec
from colonnade.models.records import records_of
from colonnade.models.reparam import centred

Weights = Mapping[str, Tensor]


def to_pre_rms(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Converts a model to `norm = "pre_rms"`; returns its config and weights.

    A tied head is untied, because the embedding is centred and the head must not be.

    Raises:
        ValueError: the model has other norms than LayerNorms before its sub-blocks.
    """
    check_layer_norm(config)
    converted = dict(weights)
    if config.tied:
        converted["head.weight"] = weights["embedding.weight"].clone()
    for name, record in parameters_of(config).items():
        if record.stream_dim is not None:
            converted[name] = centred(weights[name], record.stream_dim)
    return config.changed(norm="pre_rms", tied=False), converted


def to_crms(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Converts a model to `norm = "crms"`, whose stream has one channel fewer.

    The norms' weights are multiplied into the weights that read their outputs, and become 1.

    Raises:
        ValueError: as `to_pre_rms`; or the norms have biases, several norms precede the same
            sub-block (`share`), a weight reads the stream in slices, or muP depends on the width.
    """
    check_layer_norm(config)
    gate = config.attention_gate if config.has("*") else "none"
    unsupported = {
        "norm_bias": config.norm_bias,
        "norm_weight": None if config.norm_weight else "false",
        "share": config.share,
        "mup_base": config.mup_base,
        "attention_gate": gate if gate == "head" else None,
    }
    for field, value in unsupported.items():
        if value:
            raise ValueError(f"model.{field} = {value}: CRMSNorm cannot hold it; pre_rms can")
    centred_config, converted = to_pre_rms(config, weights)
    for name, record in parameters_of(centred_config).items():
        weight, dim = converted[name], record.stream_dim
        if record.role == "reads":
            scaled = weight * weights[norm_before(name)]
            # The omitted channel is minus the sum of the others, so its column is subtracted.
            converted[name] = scaled[..., :-1] - scaled[..., -1:]
        elif dim is not None:
            converted[name] = weight.narrow(dim, 0, weight.shape[dim] - 1)
        elif is_stream_norm(name):
            converted[name] = torch.ones_like(weight[:-1])
    return centred_config.explicit().changed(norm="crms", hidden=config.hidden - 1), converted


def check_layer_norm(config: ModelConfig) -> None:
    """Raises ValueError unless the model has only LayerNorms, before its sub-blocks.

    The output of a norm behind a sub-block is not centred.
    """
    required = {
        "norm": "layer",
        "norm_position": "before",
        "norm_after": "",
        "sigma_reparam": False,
        "mtp": 0,
    }
    for field, wanted in required.items():
        if (value := getattr(config, field)) != wanted:
            raise ValueError(f"model.{field} = {value}: this conversion starts from {wanted}")


def parameters_of(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Returns the record of every parameter, by canonical name."""
    return {name: record for name, record in records_of(config).items() if not record.state}


def is_stream_norm(name: str) -> bool:
    """Whether a parameter belongs to a norm on the residual stream, not inside a sub-block."""
    return name.startswith(("norms.", "final."))


def norm_before(name: str) -> str:
    """Returns the name of the weight of the norm whose output the weight `name` reads."""
    if name == "head.weight":
        return "final.weight"
    index = name.removeprefix("blocks.").split(".")[0]
    return f"norms.{index}.weight"
