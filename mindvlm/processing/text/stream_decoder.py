"""Ids of a running generation to pieces of text that are safe to print."""

from mindvlm.processing.text.tokenizer import Tokenizer


class StreamDecoder:
    """Gives out whole characters only: what later ids could still change waits for them.

    All pieces plus the last `flush()` joined are the same string as `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._decoder = tokenizer.text_decoder(skip_special=skip_special)

    def push(self, token_id: int) -> str:
        """The text that became settled with this id; often empty."""
        return self._decoder.push(token_id)

    def flush(self) -> str:
        """Ends the text: what is left of a cut character becomes U+FFFD. The decoder can be used again."""
        return self._decoder.flush()
