"""Generates text with a model, one token at a time, with a cache of keys, values and states."""

from pathlib import Path

import torch
from torch import Tensor

from colonnade.kernels.draws import hashed
from colonnade.launcher.checkpoint import load
from colonnade.launcher.checkpoint.folders import checkpoint_of
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.cluster.ranks import SINGLE_PROCESS, choose_device, settle_threads
from colonnade.launcher.data.tokenizer import Tokenizer, tokenizer_of
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.weights.source import recipe_in_force
from colonnade.models.cache import Cache
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.parallelize import storage_dtype
from colonnade.parallel.passes import Passes, evaluating


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Draws a token from `[V]` logits; temperature 0 takes the most likely."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k and top_k < logits.numel():
        logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


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

    The model sees at most `seq_len` tokens: when there are more, it starts anew, with an empty
    cache, from the last half of them. `seed` is that of the drawn tokens, and of random experts
    (THOR), which are drawn once for a text. Where the model is sharded, the forward pass is
    collective: every rank must call this with the same arguments.
    """
    generator, rng_key = torch.Generator().manual_seed(seed), int(hashed(seed))
    generated: list[int] = []
    pending, cache, cached = tokens[-seq_len:], Cache(), 0  # the next input; tokens in the cache
    device = passes.device
    with evaluating(passes.model):
        while len(generated) < count:
            if cached + len(pending) > seq_len:
                pending, cache, cached = (tokens + generated)[-max(1, seq_len // 2) :], Cache(), 0
            positions = torch.arange(cached, cached + len(pending), device=device)[:, None]
            inputs = torch.tensor(pending, device=device)[:, None]
            logits = passes.next_logits(inputs, Context(positions, rng_key=rng_key, cache=cache))[0]
            cached += len(pending)
            token = sample_token(logits, temperature, top_k, generator)
            if token == stop:
                break
            generated.append(token)
            pending = [token]
    return generated


def open_model(run: Path) -> tuple[Decoder, Recipe, Tokenizer, torch.device]:
    """Loads the trained model of a run folder, or of one of its checkpoints, onto one device.

    Raises:
        UserError: there is no complete checkpoint, or the recipe names no tokenizer.
    """
    folder = checkpoint_of(run)
    if folder is None:
        raise UserError(f"{run}: no complete checkpoint here; name a run folder or a checkpoint")
    recipe = recipe_in_force(folder)
    tokenizer = tokenizer_of(recipe.data)
    if tokenizer is None:
        raise UserError(
            f"{run}: trained on token files, and data.tokenizer does not name their tokenizer; "
            "resume the run with data.tokenizer=... (a tokenizer.json, or bytes) to write text"
        )
    settle_threads(SINGLE_PROCESS)
    device = choose_device(recipe.train.device, SINGLE_PROCESS)
    settle_products(device)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    model.to(storage_dtype(recipe.train.precision)).to_empty(device=device)
    load(folder, named_tensors(model, None), partial=True)
    return model, recipe, tokenizer, device


def generate(
    checkpoint: str | Path,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Generates text that follows `prompt` with a trained model; returns it without the prompt.

    Args:
        checkpoint: a run folder, or one of its checkpoints.
        tokens: the largest number of tokens; the end of the document ends the text earlier.
        temperature: 0 always takes the most likely token.
        top_k: draws only among the k most likely tokens; None: among all.
        seed: of the drawn tokens, and of random experts (THOR), as in `extend`.

    Raises:
        UserError: there is no checkpoint, or the prompt needs tokens that the model lacks.
    """
    model, recipe, tokenizer, device = open_model(Path(checkpoint))
    prompt_tokens = tokenizer.encode([prompt])[0] or [tokenizer.eod]
    generated = extend(
        Passes(model, device), prompt_tokens, tokens, recipe.train.seq_len, tokenizer.eod,
        temperature, top_k, seed,
    )  # fmt: skip
    return tokenizer.decode(generated)
