"""Vocabulary sizes: of the byte tokenizer, and how large a model's may be. Imports no torch."""

BYTE_TOKENS = 257  # the 256 bytes and the end-of-document token


def far_above(vocab: int, size: int) -> bool:
    """Whether a model's vocabulary exceeds a tokenizer's `size` by more than padding explains."""
    return vocab > 2 * size + 1024
