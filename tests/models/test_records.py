"""The records of a model, made without torch, are equal to those of its modules."""

import subprocess
import sys

import pytest
import torch

from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import declared
from colonnade.models.records import records_of
from colonnade.models.shapes import measure

MODELS = {
    **{symbol: {"pattern": symbol} for symbol in CARDS},
    "latent": {"pattern": "*-", "attention": "mla", "q_rank": 8, "kv_rank": 8, "sinks": True},
    "gates": {
        "pattern": "*",
        "attention_gate": "head",
        "qk_norm": "full",
        "attention_conv": 3,
        "attention_bias": "all",
    },
    "shared": {"pattern": "*E", "repeat": 3, "share": True, "shared_ffn": 8, "shared_gate": True},
    "σReparam": {"pattern": "ME-", "sigma_reparam": True, "activation": "polynorm"},
    "further": {"pattern": "*", "mtp": 2, "mtp_pattern": "G-", "norm_position": "both"},
    "by kind": {"pattern": "-*-G", "mtp": 1, "mtp_pattern": "*-G", "norm_after": "G"},
    "muP": {"pattern": "*m-", "mup_base": {"hidden": 32}, "tied": True, "mup_zero_init": True},
    "biases": {"pattern": "*-", "attention_bias": "qkv", "mlp_bias": True, "learned_positions": 9},
    "norms": {"pattern": "D", "norm": "layer", "norm_bias": True, "router_bias": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_records_are_those_of_the_modules(name: str) -> None:
    config = ModelConfig.model_validate({"hidden": 64, "vocab": 40, **MODELS[name]})
    with torch.device("meta"):
        model = Decoder(config)
    records = records_of(config)
    states = {name: tuple(t.shape) for name, t in model.named_buffers()}
    assert {n: r.shape for n, r in records.items() if r.state} == states
    in_modules = {n: (tuple(p.shape), s.role, s.split, s.decayed) for n, p, s in declared(model)}
    assert in_modules == {
        n: (r.shape, r.role, r.split, r.decayed) for n, r in records.items() if not r.state
    }
    assert measure(config, 16).parameters == sum(p.numel() for p in model.parameters())


def test_a_model_is_measured_without_torch() -> None:
    code = (
        "import sys; from colonnade.models.config import ModelConfig; "
        "from colonnade.models.shapes import measure; "
        "print(measure(ModelConfig(), 8).parameters, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[1] == "False"
