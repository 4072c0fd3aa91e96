"""A tiny recipe over random tokens, for tests that train it."""

from collections.abc import Callable
from pathlib import Path

from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe

MakeRecipe = Callable[..., Recipe]
VOCAB = 50  # of its tokens


def tiny_recipe(folder: Path, tokens: Path, *fields: str) -> MakeRecipe:
    """Returns a function that loads the recipe with fields and further overrides.

    Args:
        folder: where its file is written.
        tokens: the prefix of a token file with VOCAB kinds of tokens.
        fields: overrides, `table.field=value`.
    """
    path = folder / "tiny.toml"
    path.write_text(
        f"""
[model]
pattern = "*-"
hidden = 16
heads = 2
ffn = 24
vocab = {VOCAB}
[train]
micro_batch = 2
seq_len = 16
[[data.sources]]
format = "tokens"
path = "{tokens}"
""",
        encoding="utf-8",
    )
    return lambda *overrides: load_recipe(path, [*fields, *overrides], None)
