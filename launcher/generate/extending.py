"""Extends a batch of texts, one token each at a time, with a cache of keys, values and states.

Texts of different lengths begin with padding, so that their ends are aligned. The padding of a text
is a document of its own, which no state crosses and no query of the text sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colonnade.kernels.draws import hashed
from colonnade.launcher.generate.sampling import Sampling, sample_tokens
from colonnade.models.cache import Cache
from colonnade.models.context import Context
from colonnade.parallel.passes import Passes, evaluating

PADDING = 0  # the token before a shorter text; any would do
END_OF_DOCUMENT, STOPPED, LENGTH = "end of document", "stopped", "length"


@dataclass
class Text:
    """A text that is being extended.

    Attributes:
        number: keys its draws, and those of random experts (THOR).
        prompt: its tokens.
        generated: tokens that follow.
        start: the first of its tokens that the model sees.
        ended: why nothing more follows; None: it does not end yet.
    """

    number: int
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    start: int = 0
    ended: str | None = None

    def in_sight(self) -> list[int]:
        """Returns the tokens that the model sees."""
        return (self.prompt + self.generated)[self.start :]

    def restart(self, seq_len: int) -> bool:
        """Whether the model saw more than `seq_len` tokens; it then sees the last half of them."""
        total = len(self.prompt) + len(self.generated)
        if total - self.start <= seq_len:
            return False
        self.start = total - max(1, seq_len // 2)
        return True


def never(text: Text) -> bool:
    """Returns False: nothing but its length and its document's end ends a text."""
    return False


def ignore(text: Text) -> None:
    """Takes no notice."""


def extend_texts(
    passes: Passes,
    texts: Sequence[Text],
    count: int | Sequence[int],
    seq_len: int,
    end_of_document: int | None,
    sampling: Sampling,
    stops: Callable[[Text], bool] = never,
    notify: Callable[[Text], object] = ignore,
) -> None:
    """Generates up to `count` tokens that follow each text, as one batch.

    The model sees at most `seq_len` tokens of a text: when there are more, it starts anew, with an
    empty cache, from the last half of them. What follows a text does not depend on the others.
    Where the model is sharded, the forward pass is collective: every rank must call this with the
    same arguments.

    Args:
        texts: with prompts of at least one token; they are changed.
        count: tokens, of all texts or of each.
        seq_len: of the training.
        end_of_document: the token before which a text ends; None: there is none.
        sampling: how tokens are drawn.
        stops: whether a text ends after its newest token.
        notify: is called with a text after each token of it, and when it ends.
    """
    counts = [count] * len(texts) if isinstance(count, int) else list(count)
    limits = {text.number: of_text for text, of_text in zip(texts, counts, strict=True)}
    rng_key = int(hashed(sampling.seed))
    for text in texts:
        text.start = max(0, len(text.prompt) - seq_len)
        if not limits[text.number]:
            text.ended = LENGTH
            notify(text)
    batch: Batch | None = None
    with evaluating(passes.model):
        while any(text.ended is None for text in texts):
            restarted = [text.restart(seq_len) for text in texts if text.ended is None]
            if batch is None or any(restarted):
                batch = Batch([text for text in texts if text.ended is None], rng_key)
            tokens = batch.next_tokens(passes, sampling)
            for text, token in zip(batch.texts, tokens, strict=True):
                if text.ended is None:
                    add_token(text, token, limits[text.number], end_of_document, stops)
                    notify(text)


def add_token(
    text: Text, token: int, limit: int, end_of_document: int | None, stops: Callable[[Text], bool]
) -> None:
    """Adds a token to a text, or ends it."""
    if token == end_of_document:
        text.ended = END_OF_DOCUMENT
        return
    text.generated.append(token)
    if stops(text):
        text.ended = STOPPED
    elif len(text.generated) >= limit:
        text.ended = LENGTH


class Batch:
    """Texts that go forward together, and their cache."""

    def __init__(self, texts: Sequence[Text], rng_key: int) -> None:
        self.texts, self.rng_key = texts, rng_key
        self.lengths = [len(text.in_sight()) for text in texts]  # of what is cached, and comes next
        self.padded = len(set(self.lengths)) > 1
        self.cache = Cache(self.padded)
        self.fresh = True

    def next_tokens(self, passes: Passes, sampling: Sampling) -> list[int]:
        """Returns the token that follows each text. Collective."""
        tokens, context = self.inputs(passes.device)
        logits = passes.next_logits(tokens, context)
        numbers, positions = (
            torch.tensor(values, device=logits.device)
            for values in zip(*((t.number, len(t.generated)) for t in self.texts), strict=True)
        )
        return sample_tokens(logits, sampling, numbers, positions).tolist()

    def inputs(self, device: torch.device) -> tuple[Tensor, Context]:
        """Returns the tokens that are not cached yet, `[S, B]`, and their context."""
        samples = torch.tensor([text.number for text in self.texts], device=device)
        documents = None
        if self.fresh:
            self.fresh, longest = False, max(self.lengths)
            rows = [text.in_sight() for text in self.texts]
            tokens = torch.tensor([[PADDING] * (longest - len(row)) + row for row in rows]).T
            padding = longest - torch.tensor(self.lengths)
            positions = torch.arange(longest)[:, None] - padding
            if self.padded:
                documents = (positions >= 0).int().to(device)
            positions = positions.clamp(min=0)
        else:
            # an ended text goes on with any token, which nobody reads
            tokens = torch.tensor([[(text.generated or text.prompt)[-1] for text in self.texts]])
            both = zip(self.lengths, self.texts, strict=True)
            self.lengths = [length + (text.ended is None) for length, text in both]
            positions = torch.tensor([self.lengths]) - 1  # an ended text stays at its last one
        context = Context(
            positions.to(device), documents, samples=samples, rng_key=self.rng_key, cache=self.cache
        )
        return tokens.to(device), context


def extend(
    passes: Passes,
    tokens: list[int],
    count: int,
    seq_len: int,
    stop: int | None,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Generates up to `count` tokens that follow `tokens`, ending before `stop`.

    `seed` is that of the drawn tokens, and of random experts (THOR), which are drawn once for a
    text. All else is as in `extend_texts`.
    """
    text = Text(0, tokens)
    sampling = Sampling(temperature, top_k, seed=seed)
    extend_texts(passes, [text], count, seq_len, stop, sampling)
    return text.generated
