"""Text as its tokens come: only whole characters are given out."""

from collections.abc import Sequence

from colonnade.launcher.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what stands for bytes that are no character
CHARACTER = 3  # bytes that an incomplete character may have: of four, three
PATIENCE = 16  # tokens after which what is broken is given out, but for an incomplete character


class TextStream:
    """Decodes what follows a prompt, piece by piece.

    A token may end within a character of several bytes, and what the next tokens make of it is not
    known: so that is held back. Tokens before the new ones are decoded with them, because some
    tokenizers decode the first token of a text in another way.

    Attributes:
        context: the token from which decoding starts.
        whole: the last number of tokens whose text ended with a whole character.
        given: characters of the text from `context` on that are given out, or of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.context, self.whole = 0, len(prompt)
        self.given = len(tokenizer.decode(list(prompt)))

    def advance(self, tokens: Sequence[int], ended: bool = False) -> str:
        """Returns the text that is new since the last call.

        Args:
            tokens: all tokens up to now, those of the prompt first.
            ended: whether no token follows: then everything is given out.
        """
        text = self.tokenizer.decode(list(tokens[self.context :]))
        known = len(text) if ended else len(text.rstrip(BROKEN))
        if len(tokens) - self.whole >= PATIENCE:
            known = max(known, len(text) - CHARACTER)
        new, self.given = text[self.given : known], max(self.given, known)
        if new and not text.endswith(BROKEN):
            self.context, self.whole = self.whole, len(tokens)
            self.given = len(self.tokenizer.decode(list(tokens[self.context :])))
        return new


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], generated: Sequence[int]) -> str:
    """Returns the text of the tokens that follow a prompt, as it stands behind it."""
    begin = tokenizer.decode(list(prompt))
    return tokenizer.decode([*prompt, *generated])[len(begin) :]
