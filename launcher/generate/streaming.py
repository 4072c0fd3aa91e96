"""Text as its tokens come: only whole characters are given out."""

from collections.abc import Sequence

from colonnade.launcher.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what stands for bytes that are no character
CHARACTER = 3  # tokens that an incomplete character may have: of four bytes, three
PATIENCE = 16  # tokens without a whole character, after which what is broken is given out


class TextStream:
    """Decodes a growing list of tokens, piece by piece.

    A token may end within a character of several bytes, and what the next tokens make of it is not
    known: so it is held back. A few tokens before the new ones are decoded with them, because some
    tokenizers decode the first token of a text in another way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context = self.given = 0  # tokens from which decoding starts; whose text is given out

    def advance(self, tokens: Sequence[int], ended: bool = False) -> str:
        """Returns the text that is new since the last call.

        Args:
            tokens: all tokens up to now.
            ended: whether no token follows: then everything is given out.
        """
        stop = len(tokens)
        if not ended and self.text(tokens, stop).endswith(BROKEN):
            if stop - self.given < PATIENCE:
                return ""
            stop -= CHARACTER  # the last tokens may be the begin of a character
        before = self.text(tokens, self.given)
        new = self.text(tokens, stop)[len(before) :]
        if not new:
            return ""
        self.context, self.given = self.given, stop
        return new

    def text(self, tokens: Sequence[int], stop: int) -> str:
        """Returns the text of the tokens from the context to `stop`."""
        return self.tokenizer.decode(list(tokens[self.context : stop]))
