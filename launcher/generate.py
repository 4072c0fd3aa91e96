"""Text from a model, one token at a time; what earlier tokens left behind is kept."""

from pathlib import Path

import torch
from torch import Tensor, nn

from colonnade.kernels.draws import hashed
from colonnade.launcher.checkpoint import load, newest
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.cluster.ranks import SINGLE_PROCESS, choose_device, settle_threads
from colonnade.launcher.data.tokenizer import Tokenizer, tokenizer_of
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.cache import Cache
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.engine import evaluating
from colonnade.parallel.parallelize import storage_dtype


def choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Draw a token from `[V]` logits; temperature 0 takes the most likely."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k and top_k < logits.numel():
        logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def extend(
    model: nn.Module,
    tokens: list[int],
    count: int,
    seq_len: int,
    stop: int | None,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Up to `count` tokens that follow `tokens`, ending before `stop`.

    At most the last `seq_len` tokens are seen: when there are more, the model starts again with
    their later half. `seed` is that of the tokens, and of random experts (THOR), which are drawn
    once for a text. Every rank of a sharded model must call this alike.
    """
    generator, rng_key = torch.Generator().manual_seed(seed), int(hashed(seed))
    made: list[int] = []
    coming, cache, seen = tokens[-seq_len:], Cache(), 0
    with evaluating(model):
        while len(made) < count:
            if seen + len(coming) > seq_len:
                coming, cache, seen = (tokens + made)[-max(1, seq_len // 2) :], Cache(), 0
            positions = torch.arange(seen, seen + len(coming), device=device)[:, None]
            inputs = torch.tensor(coming, device=device)[:, None]
            logits = model(inputs, Context(positions, rng_key=rng_key, cache=cache))[-1, 0]
            seen += len(coming)
            token = choose(logits, temperature, top_k, generator)
            if token == stop:
                break
            made.append(token)
            coming = [token]
    return made


def open_model(run: Path) -> tuple[Decoder, Recipe, Tokenizer, torch.device]:
    """The trained model of a run folder, or of one of its checkpoints, on one device."""
    folder = run if (run / "state.json").exists() else newest(run / "checkpoints")
    if folder is None:
        raise UserError(f"{run}: no complete checkpoint here; name a run folder or a checkpoint")
    recipe = load_recipe(folder.parent.parent / "recipe.toml")
    tokenizer = tokenizer_of(recipe.data)
    if tokenizer is None:
        raise UserError(
            f"{run}: trained on tokens, and data.tokenizer does not say by what they were made; "
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
    """The text that a trained model writes after `prompt` (prompt not included).

    Args:
        checkpoint: a run folder, or one of its checkpoints.
        tokens: how many at most; the end of the document ends it earlier.
        temperature: 0 always takes the most likely token.
        top_k: draw among the k most likely only; None: among all.

    Raises:
        UserError: no checkpoint there, or the prompt needs tokens the model lacks.
    """
    model, recipe, tokenizer, device = open_model(Path(checkpoint))
    start = tokenizer.encode([prompt])[0] or [tokenizer.eod]
    made = extend(
        model, start, tokens, recipe.train.seq_len, tokenizer.eod, device, temperature, top_k, seed
    )
    return tokenizer.decode(made)
