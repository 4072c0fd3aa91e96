"""Every Hugging Face family: the converted model computes the same, and maps lose nothing."""

import oracle
import pytest
import test_hf_biased
import test_hf_dense
import test_hf_gpt2
import test_hf_gpt_oss
import test_hf_granite
import test_hf_hybrid
import test_hf_mamba
import test_hf_mixtures
import test_hf_moe
import test_hf_normed_mamba
import test_hf_olmo_hybrid
import test_hf_phi3
import test_hf_positions
import torch
from oracle import Case

from colonnade.launcher.convert.huggingface.families import FAMILIES

MODULES = (
    test_hf_dense,
    test_hf_biased,
    test_hf_granite,
    test_hf_gpt2,
    test_hf_gpt_oss,
    test_hf_positions,
    test_hf_normed_mamba,
    test_hf_moe,
    test_hf_phi3,
    test_hf_mixtures,
    test_hf_mamba,
    test_hf_hybrid,
    test_hf_olmo_hybrid,
)
ALL = [case for module in MODULES for case in module.CASES]
each = pytest.mark.parametrize("case", ALL, ids=str)


def test_every_family_has_a_case() -> None:
    with oracle.fp64():
        names = {type(case.build()).__name__ for case in ALL}
    assert names == {name.architecture for name in FAMILIES.values()}


@each
def test_logits_loss_and_gradients(case: Case) -> None:
    oracle.assert_same_function(case.build(), seed=1)


@each
def test_config_round_trip(case: Case) -> None:
    oracle.assert_config_round_trip(case.build())


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weight_round_trips(case: Case, dtype: torch.dtype) -> None:
    oracle.assert_weight_round_trips(case.build(), dtype)
