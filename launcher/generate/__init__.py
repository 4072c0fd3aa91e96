"""Generates text with a trained model.

opening    a trained model on one device, or on ranks
extending  token after token, a batch of texts at a time, with a cache
sampling   which token comes next
prompts    of a file, and their tokens
streaming  text as its tokens come
run        the verb `generate`
"""

from colonnade.launcher.generate.extending import extend
from colonnade.launcher.generate.run import generate

__all__ = ["extend", "generate"]
