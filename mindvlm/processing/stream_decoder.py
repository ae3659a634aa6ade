"""Ids of a running generation to pieces of text that are safe to print."""

import codecs

from mindvlm.processing.tokenizer import Tokenizer


class StreamDecoder:
    """Gives out whole characters only: bytes of an unfinished UTF-8 character wait for the next id.

    All pieces plus the last `flush()` joined are the same string as `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became complete with this id; often empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id], skip_special=self._skip_special))

    def flush(self) -> str:
        """Ends the text: what is left of a cut character becomes U+FFFD. The decoder can be used again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
