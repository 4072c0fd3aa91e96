"""Drawing tokens from logits, and extending a text with caches."""

import pytest
import torch
from small import V, config_of, model_of

from colonnade.kernels.draws import draw_integers, hashed
from colonnade.launcher.generate import choose, extend
from colonnade.models.blocks import thor
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.engine import evaluating


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


def by_whole_context(model: Decoder, tokens: list[int], count: int, seq_len: int) -> list[int]:
    """The most likely tokens, each from all that is seen, without caches."""
    seen, made = tokens[-seq_len:], []
    for _ in range(count):
        if len(seen) > seq_len:
            seen = (tokens + made)[-(seq_len // 2) :]
        row = torch.tensor(seen)[:, None]
        with evaluating(model):
            positions = torch.arange(len(seen))[:, None]
            logits = model(row, Context(positions, rng_key=int(hashed(0))))
        made.append(int(logits[-1, 0].argmax()))
        seen = [*seen, made[-1]]
    return made


@pytest.mark.parametrize("pattern", ["*-", "MmSDG", "*T-E"])
@pytest.mark.parametrize("prompt", [1, 9, 30])
def test_extending_with_caches_writes_what_the_whole_context_does(
    pattern: str, prompt: int
) -> None:
    """Also past `seq_len`, where the model starts again with the later half."""
    model = model_of(config_of(pattern), seed=prompt)
    g = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(V, (prompt,), generator=g).tolist()
    made = extend(model, tokens, 40, 16, None, torch.device("cpu"), temperature=0)
    assert made == by_whole_context(model, tokens, 40, 16)
    assert len(set(made)) > 2


def test_random_experts_are_drawn_for_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """THOR's inference (arXiv:2110.04260): every expert serves, each text one of a layer's own."""
    drawn: list[int] = []

    def spy(n: int, *keys: int | torch.Tensor) -> torch.Tensor:
        chosen = draw_integers(n, *keys)
        drawn.append(int(chosen))
        return chosen

    monkeypatch.setattr(thor, "draw_integers", spy)
    model = model_of(config_of("TT", experts=4), seed=3)
    seen = set()
    for seed in range(40):
        drawn.clear()
        extend(model, [1, 2, 3], 3, 16, None, torch.device("cpu"), seed=seed)
        assert drawn == drawn[:2] * 3  # of two layers, for three tokens
        seen.add(tuple(drawn[:2]))
    assert len(seen) > 10  # of 16 pairs


def test_extending_ends_before_the_stop() -> None:
    model = model_of(config_of("*-"), seed=1)
    free = extend(model, [1, 2], 12, 16, None, torch.device("cpu"), temperature=0)
    stop = free[5]
    made = extend(model, [1, 2], 12, 16, stop, torch.device("cpu"), temperature=0)
    assert made == free[: free.index(stop)]
