"""Drawing tokens from logits."""

import torch

from colonnade.launcher.generation import choose


def draws(temperature: float, top_k: int | None, count: int = 4000) -> torch.Tensor:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    chosen = [choose(logits, temperature, top_k, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(chosen), minlength=4) / count


def test_temperature_zero_is_greedy() -> None:
    assert draws(0, None, 5).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_softmax() -> None:
    expected = (torch.tensor([1.0, 3.0, 2.0, -1.0]) / 0.7).softmax(-1)
    assert torch.allclose(draws(0.7, None), expected, atol=0.03)


def test_top_k_leaves_the_others_out() -> None:
    expected = torch.tensor([0.0, 3.0, 2.0, 0.0])[1:3].softmax(-1)
    shares = draws(1.0, 2)
    assert shares[0] == shares[3] == 0
    assert torch.allclose(shares[1:3], expected, atol=0.03)
