"""Texts of different lengths in one batch are what each becomes by itself, for every sub-block."""

from typing import Any

import pytest
import torch
from equal import assert_equal
from small import V, config_of, model_of
from torch import Tensor

from colonnade.launcher.generate.extending import LENGTH, STOPPED, Text, extend_texts
from colonnade.launcher.generate.sampling import Sampling
from colonnade.models.config import CARDS
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.passes import Passes

CPU = torch.device("cpu")
LENGTHS = (1, 9, 2, 14, 5)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{symbol: (symbol * 2, {}) for symbol in CARDS},
    "hybrid, ladder": ("MmSD*GE-T", {"residual": "ladder"}),
    "grouped queries, window": ("***", {"kv_heads": 2, "window": 4, "full_attention": (1,)}),
    "latent attention": ("*-*", {"attention": "mla", "q_rank": 5, "kv_rank": 7, "rope_dim": 4}),
    "gates, norms, convolutions": (
        "**",
        {"attention_gate": "head", "qk_norm": "head", "attention_conv": 3},
    ),
    "sinks, cap": ("**", {"sinks": True, "attention_cap": 2.0}),
    "clipped softmax, temperature": (
        "**", {"clip_low": -0.05, "clip_high": 1.1, "position_temperature": True},
    ),
}  # fmt: skip


class Recorded(Passes):
    """Keeps the logits of each call."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model, CPU)
        self.calls: list[Tensor] = []

    def next_logits(self, tokens: Tensor, context: Context) -> Tensor:
        self.calls.append(super().next_logits(tokens, context))
        return self.calls[-1]


def texts_of(seed: int) -> list[Text]:
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(V, (n,), generator=g).tolist() for n in LENGTHS]
    return [Text(number, prompt) for number, prompt in enumerate(prompts)]


def results(
    model: Decoder, texts: list[Text], count: int, seq_len: int, sampling: Sampling
) -> list[Tensor]:
    """Extends texts as one batch; returns the logits of each call."""
    passes = Recorded(model)
    extend_texts(passes, texts, count, seq_len, None, sampling)
    return passes.calls


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_texts(name: str) -> None:
    """All logits of all steps, with a cache that begins with padding."""
    pattern, fields = CASES[name]
    model = model_of(config_of(pattern, **fields), seed=4)
    together = texts_of(4)
    logits = results(model, together, 6, 100, Sampling(0))
    for text in texts_of(4):
        alone = results(model, [text], 6, 100, Sampling(0))
        assert text.generated == together[text.number].generated
        for step, (one, all_rows) in enumerate(zip(alone, logits, strict=True)):
            assert_equal({f"{step}": one[0]}, {f"{step}": all_rows[text.number]})


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, seed=3)], ids=["greedy", "drawn"])
def test_texts_start_anew_at_their_own_lengths(sampling: Sampling) -> None:
    """Also past `seq_len`, where one text drops half of what it sees and the others go on."""
    model = model_of(config_of("M*T-"), seed=5)
    together = texts_of(5)
    extend_texts(Passes(model, CPU), together, 30, 16, None, sampling)
    for text in texts_of(5):
        extend_texts(Passes(model, CPU), [text], 30, 16, None, sampling)
        assert text.generated == together[text.number].generated
        assert text.ended == LENGTH
    assert len({tuple(text.generated) for text in together}) == len(together)


def test_texts_end_by_themselves() -> None:
    """Each at its own limit, at the end of the document, or where the caller stops it."""
    model = model_of(config_of("*-M"), seed=6)
    free = texts_of(6)
    extend_texts(Passes(model, CPU), free, 12, 100, None, Sampling(1.0, seed=1))
    end = free[0].generated[4]
    texts, seen = texts_of(6), []

    def stops(text: Text) -> bool:
        return text.number == 1 and len(text.generated) == 3

    limits = [12, 12, 0, 1, 7]
    extend_texts(
        Passes(model, CPU), texts, limits, 100, end, Sampling(1.0, seed=1), stops,
        lambda text: seen.append(text.number) if text.ended else None,
    )  # fmt: skip
    for text, other, limit in zip(texts, free, limits, strict=True):
        whole = other.generated[: 3 if text.number == 1 else limit]
        expected = whole[: whole.index(end)] if end in whole else whole
        assert text.generated == expected
        if text.number == 1 and end not in whole:
            assert text.ended == STOPPED
    assert texts[0].ended == "end of document"
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[0] == 2


def test_texts_of_one_length_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config_of("*M"), seed=7)
    contexts = []
    forward = Decoder.forward

    def spy(self: Decoder, tokens: Tensor, context: Context, **options: Any) -> Any:
        contexts.append((context.documents, context.key_documents(3)))
        return forward(self, tokens, context, **options)

    monkeypatch.setattr(Decoder, "forward", spy)
    texts = [Text(0, [1, 2, 3]), Text(1, [4, 5, 6])]
    extend_texts(Passes(model, CPU), texts, 3, 100, None, Sampling(0))
    assert contexts == [(None, None)] * 3


def test_a_text_that_has_ended_takes_no_further_positions() -> None:
    """Of which a table of learned positions has no more than `seq_len`."""
    model = model_of(config_of("*-", positions="none", learned_positions=16), seed=8)
    g = torch.Generator().manual_seed(8)
    prompts = [torch.randint(V, (n,), generator=g).tolist() for n in (15, 3)]
    texts = [Text(number, prompt) for number, prompt in enumerate(prompts)]
    extend_texts(Passes(model, CPU), texts, [1, 12], 16, None, Sampling(0))
    alone = Text(1, prompts[1])
    extend_texts(Passes(model, CPU), [alone], 12, 16, None, Sampling(0))
    assert texts[1].generated == alone.generated
