"""How many tokens there are, and how many a model may have. Imports no torch, as rules need it."""

BYTE_TOKENS = 257  # the 256 bytes, and the end of a document


def far_above(vocab: int, size: int) -> bool:
    """Whether a model's vocabulary is larger than any padding explains for so many tokens."""
    return vocab > 2 * size + 1024
