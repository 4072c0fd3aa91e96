"""`bench loader`: reading batches from a token file, beside a copy of as many bytes.

The floor is a plain copy of the four tensors of a batch: no loader can be faster.
"""

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from colonnade.bench.timing import alternate, median_ratio
from colonnade.launcher.data import IndexedWriter, open_data
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig

MEAN_LENGTH, BATCH, SEQ = 1000, 8, 4096


def write_tokens(prefix: Path, vocab: int, count: int) -> None:
    """Writes a file of random documents of about MEAN_LENGTH tokens each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (count,), generator=generator, dtype=torch.int32).numpy()
    documents = count // MEAN_LENGTH
    lengths = torch.randint(1, 2 * MEAN_LENGTH, (documents,), generator=generator).tolist()
    with IndexedWriter(prefix, token_dtype(vocab)) as writer:
        start = 0
        for length in lengths:
            writer.add(tokens[start : start + length])
            start += length


def run(count: int = 64_000_000, batches: int = 40, rounds: int = 9) -> dict[str, Any]:
    """Tokens/s of `Rows.batch` in one process and of the copy, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokens"
        vocab = 50_000
        write_tokens(prefix, vocab, count)
        recipe = Recipe(
            model=Recipe().model.model_copy(update={"vocab": vocab}),
            data=DataConfig(
                sources=(SourceConfig(format="tokens", path=str(prefix)),), validation=0.0
            ),
            train=TrainConfig(seq_len=SEQ),
        )
        rows = open_data(recipe).train
        samples = itertools.count()
        tensors = [t.clone() for t in rows.batch(range(BATCH))]

        def read() -> None:
            for _ in range(batches):
                rows.batch([next(samples) for _ in range(BATCH)])

        def copy() -> None:
            for _ in range(batches):
                [t.clone() for t in tensors]

        seconds = alternate({"loader": read, "copy": copy}, rounds=rounds)
    tokens = batches * BATCH * SEQ
    return {
        "shape": f"sequence {SEQ}, batch {BATCH}, documents of {MEAN_LENGTH} tokens, u16 on disk",
        "threads": torch.get_num_threads(),
        "loader tokens/s": tokens / statistics.median(seconds["loader"]),
        "copy tokens/s (floor)": tokens / statistics.median(seconds["copy"]),
        "speed, loader / copy": median_ratio(seconds["copy"], seconds["loader"]),
    }
