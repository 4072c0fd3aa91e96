"""The engine: evaluation mode, and the modes after it."""

import torch
from torch import nn

from colonnade.parallel.passes import evaluating


def test_evaluation_restores_the_mode_of_each_module() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, False, True]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
