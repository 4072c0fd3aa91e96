"""Log-likelihoods of texts, and texts up to a stop, as evaluation tasks ask for them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate.extending import Text, extend_texts
from colonnade.launcher.generate.opening import Trained
from colonnade.launcher.generate.prompts import first_tokens, require_vocabulary
from colonnade.launcher.generate.sampling import Sampling
from colonnade.models.context import Context
from colonnade.parallel.passes import evaluating

Tokens = list[int]
GENERATED = 256  # tokens of a text for which no task gives another number
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
        log_likelihood: in nats, summed over its tokens.
        greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    greedy: bool


def first_token(tokenizer: Tokenizer) -> int:
    """Returns the token that stands before a text without a context."""
    return tokenizer.eod if tokenizer.bos is None else tokenizer.bos


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """Returns the tokens of a text, as a document begins."""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return begin + tokenizer.encode([text])[0]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Returns the tokens of a context and of what continues it, which are those of both together.

    Spaces at the end of the context belong to the continuation, as tokens begin with spaces.
    """
    if not context:
        tokens = tokenizer.encode([continuation])[0]
        first = first_token(tokenizer)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [first] else ([first], tokens)
    stripped = context.rstrip()
    both = encode(tokenizer, context + continuation)
    count = len(encode(tokenizer, stripped))
    return both[:count], both[count:]


def windows(tokens: Tokens, first: int, seq_len: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yields contexts and continuations that score every token of a text once.

    Each continuation has at most `seq_len` tokens; only the last one, which may have fewer, has a
    context of more than one token, so that together they are `seq_len` + 1.
    """
    for start in range(0, len(tokens), seq_len):
        stop = min(start + seq_len, len(tokens))
        context = tokens[max(0, stop - seq_len - 1) : start] if start else [first]
        yield context, tokens[start:stop]


def score(trained: Trained, pairs: Sequence[tuple[Tokens, Tokens]], batch: int = 8) -> list[Score]:
    """Scores continuations after their contexts; of a text longer than the model sees, its end.

    Collective: every rank gives the same pairs.

    Args:
        pairs: tokens of a context, at least one, and of its continuation.
        batch: texts that go forward together, longest first.
    """
    longest, scores = trained.recipe.train.seq_len, [Score(0.0, True)] * len(pairs)
    inputs = [(context + continuation)[-longest - 1 :][:-1] for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -len(inputs[index]))
    order = [index for index in order if pairs[index][1]]
    for context, following in pairs:
        require_vocabulary([*context, *following], trained.recipe.model.vocab, "a text of the task")
    with evaluating(trained.passes.model):
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            longest_input = len(inputs[some[0]])
            # padding behind a text changes nothing of it
            rows = [inputs[i] + [0] * (longest_input - len(inputs[i])) for i in some]
            tokens = torch.tensor(rows, device=trained.device).T
            samples = torch.tensor(some, device=trained.device)  # key random experts (THOR)
            keyed = dataclasses.replace(Context.of_rows(tokens), samples=samples)
            logits = trained.passes.logits(tokens, keyed)
            for column, index in enumerate(some):
                stop = len(inputs[index])
                continuation = torch.tensor(pairs[index][1][-stop:], device=trained.device)
                of_text = logits[stop - len(continuation) : stop, column]
                wide = of_text.double() if of_text.dtype == torch.float64 else of_text.float()
                chosen = wide.log_softmax(-1).gather(-1, continuation[:, None]).sum()
                greedy = bool((wide.argmax(-1) == continuation).all())
                scores[index] = Score(float(chosen), greedy)
    return scores


def score_texts(trained: Trained, texts: Sequence[str], batch: int = 8) -> list[float]:
    """Returns the log-likelihood of whole texts, each by itself, in windows of what the model sees.
    Collective."""
    tokenizer = tokenizer_of(trained)
    first, seq_len = first_token(tokenizer), trained.recipe.train.seq_len
    of_text, pairs = [], []
    for number, text in enumerate(texts):
        for pair in windows(tokenizer.encode([text])[0], first, seq_len):
            of_text.append(number)
            pairs.append(pair)
    sums = [0.0] * len(texts)
    for number, scored in zip(of_text, score(trained, pairs, batch), strict=True):
        sums[number] += scored.log_likelihood
    return sums


class Request(NamedTuple):
    """A text to be continued.

    Attributes:
        context: the text.
        until: strings at which what follows ends; they are left out.
        limit: the largest number of tokens.
        sampling: how they are drawn.
    """

    context: str
    until: tuple[str, ...]
    limit: int
    sampling: Sampling

    @classmethod
    def of(cls, context: str, options: Mapping[str, Any], seed: int = 0) -> "Request":
        """Reads the options of a task.

        Raises:
            UserError: an option that is not known.
        """
        left = dict(options)
        until = left.pop("until", None) or []
        limit = next((left[name] for name in LENGTHS if left.get(name) is not None), GENERATED)
        for name in LENGTHS:
            left.pop(name, None)
        draws = left.pop("do_sample", None)
        temperature = float(left.pop("temperature", 0.0 if not draws else 1.0) or 0.0)
        top_k, top_p = left.pop("top_k", None) or None, left.pop("top_p", None)
        if unknown := sorted(name for name, value in left.items() if value is not None):
            raise UserError(
                f"the task generates with {', '.join(unknown)}, which is not known here; it may "
                f"give until, do_sample, temperature, top_k, top_p, {LENGTHS[0]}"
            )
        sampling = Sampling(temperature if draws is not False else 0.0, top_k, top_p, seed)
        until = (until,) if isinstance(until, str) else tuple(until)
        return cls(context, tuple(filter(None, until)), int(limit), sampling)


def complete(trained: Trained, requests: Sequence[Request], batch: int = 8) -> list[str]:
    """Returns what follows each context, up to its first stop. Collective.

    A context that leaves no room for the tokens loses its begin.
    """
    tokenizer, seq_len = tokenizer_of(trained), trained.recipe.train.seq_len
    prompts = []
    for request in requests:
        room = seq_len - request.limit
        if room < 1:
            raise UserError(
                f"the task generates {request.limit} tokens, and the model sees {seq_len}: set "
                "train.seq_len to more"
            )
        tokens = first_tokens(request.context, tokenizer, trained.recipe.model.vocab)
        prompts.append(tokens[-room:])
    results = [""] * len(requests)
    for sampling in dict.fromkeys(request.sampling for request in requests):
        order = [i for i, request in enumerate(requests) if request.sampling == sampling]
        order.sort(key=lambda index: -len(prompts[index]))
        for first in range(0, len(order), batch):
            texts = [Text(index, prompts[index]) for index in order[first : first + batch]]
            extend_texts(
                trained.passes,
                texts,
                [requests[text.number].limit for text in texts],
                seq_len,
                tokenizer.eod,
                sampling,
                lambda text: has_stop(tokenizer, text.generated, requests[text.number].until),
            )
            for text in texts:
                until = requests[text.number].until
                results[text.number] = before_stop(tokenizer.decode(text.generated), until)
    return results


def has_stop(tokenizer: Tokenizer, tokens: Tokens, until: Sequence[str]) -> bool:
    """Whether a stop is within the newest tokens."""
    if not until:
        return False
    longest = max(map(len, until))  # a token has at least a character, or a byte of one
    newest = tokenizer.decode(tokens[-4 * longest - 4 :])
    return any(stop in newest for stop in until)


def before_stop(text: str, until: Sequence[str]) -> str:
    """Returns a text up to the first of the stops."""
    for stop in until:
        text = text.partition(stop)[0]
    return text


def tokenizer_of(trained: Trained) -> Tokenizer:
    """Returns the tokenizer of a model; raises UserError if none is known."""
    if trained.tokenizer is None:
        raise UserError(
            "tasks are text, and no tokenizer of the model is known: give data.tokenizer=... (a "
            "tokenizer.json, or bytes)"
        )
    return trained.tokenizer
