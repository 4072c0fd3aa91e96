"""Drawing tokens from logits, and extending a text with caches."""

from typing import Any

import pytest
import torch
from small import V, config_of, model_of
from transformers import TopPLogitsWarper

from colonnade.kernels.draws import draw_integers, hashed
from colonnade.launcher.generate import extend
from colonnade.launcher.generate.sampling import Sampling, sample_tokens
from colonnade.models.blocks import thor
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.passes import Passes, evaluating

CPU = torch.device("cpu")


def frequencies(count: int = 4000, **options: Any) -> torch.Tensor:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).expand(count, 4)
    drawn = sample_tokens(
        logits, Sampling(**options), torch.tensor([7]).expand(count), torch.arange(count)
    )
    return torch.bincount(drawn, minlength=4) / count


def test_temperature_zero_is_greedy() -> None:
    assert frequencies(5, temperature=0).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_softmax() -> None:
    expected = (torch.tensor([1.0, 3.0, 2.0, -1.0]) / 0.7).softmax(-1)
    assert torch.allclose(frequencies(temperature=0.7), expected, atol=0.03)


def test_top_k_excludes_the_others() -> None:
    expected = torch.tensor([0.0, 3.0, 2.0, 0.0])[1:3].softmax(-1)
    drawn = frequencies(temperature=1.0, top_k=2)
    assert drawn[0] == drawn[3] == 0
    assert torch.allclose(drawn[1:3], expected, atol=0.03)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.7, 0.9, 0.95, 0.99, 1.0])
def test_top_p_is_that_of_transformers(share: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).double()
    theirs = TopPLogitsWarper(share)(torch.zeros(1, 1), logits.clone()).softmax(-1)[0]
    drawn = frequencies(temperature=1.0, top_p=share)
    assert torch.allclose(drawn, theirs.float(), atol=0.03)
    assert (drawn[theirs == 0] == 0).all()


def test_draws_depend_on_seed_text_and_position_alone() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    texts, positions = torch.arange(6), torch.arange(6) * 3
    together = sample_tokens(logits, Sampling(seed=5), texts, positions)
    for row in (2, 0, 5):
        alone = sample_tokens(
            logits[row : row + 1], Sampling(seed=5), texts[row : row + 1], positions[row : row + 1]
        )
        assert alone[0] == together[row]
    same = logits[:1].expand(200, -1)
    drawn = [
        sample_tokens(same, Sampling(seed=seed), *keys).tolist()
        for seed, keys in (
            (5, (torch.arange(200), torch.zeros(200).long())),
            (6, (torch.arange(200), torch.zeros(200).long())),
            (5, (torch.zeros(200).long(), torch.arange(200))),
        )
    ]
    assert all(len(set(row)) > 10 for row in drawn)
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def extend_without_cache(model: Decoder, tokens: list[int], count: int, seq_len: int) -> list[int]:
    """Generates the most likely tokens, each in a forward pass over all tokens in sight."""
    seen, generated = tokens[-seq_len:], []
    for _ in range(count):
        if len(seen) > seq_len:
            seen = (tokens + generated)[-(seq_len // 2) :]
        row = torch.tensor(seen)[:, None]
        with evaluating(model):
            positions = torch.arange(len(seen))[:, None]
            logits = model(row, Context(positions, rng_key=int(hashed(0))))
        generated.append(int(logits[-1, 0].argmax()))
        seen = [*seen, generated[-1]]
    return generated


@pytest.mark.parametrize("pattern", ["*-", "MmSDG", "*T-E"])
@pytest.mark.parametrize("prompt", [1, 9, 30])
def test_extending_equals_full_forward_passes(pattern: str, prompt: int) -> None:
    """Also past `seq_len`, where the model starts anew from the last half of the tokens."""
    model = model_of(config_of(pattern), seed=prompt)
    g = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(V, (prompt,), generator=g).tolist()
    generated = extend(Passes(model, CPU), tokens, 40, 16, None, temperature=0)
    assert generated == extend_without_cache(model, tokens, 40, 16)
    assert len(set(generated)) > 2


def test_random_experts_are_drawn_for_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """THOR's inference (arXiv:2110.04260): each text draws one expert of every layer.

    It keeps them where the model starts anew past `seq_len`; the draws of a seed are repeatable.
    """
    drawn: list[int] = []

    def spy(n: int, *keys: int | torch.Tensor) -> torch.Tensor:
        expert = draw_integers(n, *keys)
        drawn.append(int(expert))
        return expert

    monkeypatch.setattr(thor, "draw_integers", spy)
    model = model_of(config_of("TT", experts=4), seed=3)

    def experts(seed: int) -> tuple[int, ...]:
        """Extends a text by 20 tokens; returns the experts of the two layers."""
        drawn.clear()
        extend(Passes(model, CPU), [1, 2, 3], 20, 16, None, seed=seed)
        assert drawn == drawn[:2] * 20
        return tuple(drawn[:2])

    seen = [experts(seed) for seed in range(40)]
    assert len(set(seen)) > 10  # of 16 pairs
    assert seen[:5] == [experts(seed) for seed in range(5)]


def test_extending_ends_before_the_stop() -> None:
    model = model_of(config_of("*-"), seed=1)
    free = extend(Passes(model, CPU), [1, 2], 12, 16, None, temperature=0)
    stop = free[5]
    stopped = extend(Passes(model, CPU), [1, 2], 12, 16, stop, temperature=0)
    assert stopped == free[: free.index(stop)]
