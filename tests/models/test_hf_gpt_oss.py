"""gpt-oss against transformers in fp64."""

from typing import Any

import pytest
import torch
from oracle import Case, fp64  # before transformers, which it keeps from packages that need a GPU
from test_hf_dense import WINDOWS, YARN, shape
from transformers import GptOssConfig, GptOssForCausalLM

from colonnade.launcher.convert.huggingface.entry import entry
from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported


def gpt_oss(rope: dict[str, Any] = YARN, **more: Any) -> Any:
    """Builds a gpt-oss of odd widths, whose head width is not hidden / heads."""
    fields = {
        "head_dim": 6, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7,
        "layer_types": WINDOWS, "experts_implementation": "eager", **more,
    }  # fmt: skip
    with fp64():
        return GptOssForCausalLM(GptOssConfig(**shape(rope, **fields)))


OSS = "transformers gpt-oss"
CASES = [
    Case("gpt-oss", "*E", "sinks, windows, biases, clamped SwiGLU, YaRN", OSS, gpt_oss),
    Case("gpt-oss-unbiased", "*E", "the same, no biases on attention, no window, tied head", OSS,
         lambda: gpt_oss(YARN | {"truncate": False}, attention_bias=False,
                         tie_word_embeddings=True, layer_types=["full_attention"] * 3)),
]  # fmt: skip
BUILDS = {"gpt_oss": gpt_oss}


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("swiglu_alpha", {"swiglu_alpha": 1.0}),
        ("swiglu_limit", {"swiglu_limit": 10.0}),
        ("rope_scaling", {"rope_parameters": None}),
        ("num_experts_per_tok", {"num_experts_per_tok": 1}),
        ("quantization_config", {"quantization_config": {"quant_method": "mxfp4"}}),
    ],
    ids=str,
)
def test_what_is_refused(field: str, given: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of("GptOssForCausalLM").config_from_hf(gpt_oss().config.to_dict() | given)
    assert caught.value.field == field


def test_boxes_of_transposed_tensors() -> None:
    """A box is read in place where one native tensor is transposed."""
    shapes = {"a": torch.Size((3, 4, 5))}
    e, whole = entry("A", "a", transposed=True), torch.randn(3, 5, 4)
    box = (slice(1, 3), slice(0, 2), slice(2, 5))
    assert e.shape(shapes) == whole.shape
    assert torch.equal(e.read("a", box, shapes, {"A": whole}.get), whole.transpose(1, 2)[box])
    assert torch.equal(e.join(e.split([whole], shapes))["A"], whole)
