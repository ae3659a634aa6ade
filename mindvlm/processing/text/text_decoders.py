"""Incremental decoders from ids to text.

`push(token_id)` returns the text that later ids cannot change; `flush()` returns the rest and resets the decoder.
`Tokenizer.decode` uses the same decoders, so a streamed answer equals the decoded one.
"""

import codecs
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

WORD_SPACE = "\u2581"
"""SentencePiece's mark of a space."""


class TextDecoder(Protocol):
    """Converts ids to text one at a time."""

    def push(self, token_id: int) -> str:
        """Takes an id and returns the text that later ids cannot change, which may be empty."""

    def flush(self) -> str:
        """Ends the text and returns the rest; an incomplete character becomes U+FFFD."""


class Utf8Decoder:
    """Joins the bytes of the ids. Bytes that are not UTF-8 become U+FFFD.

    Args:
        token_bytes: returns the bytes of an id.
        errors: error handler of the codecs module.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, errors: str = "replace"):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors=errors)

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    return "\ufffd", error.start + 1


codecs.register_error("mindvlm_byte", _one_mark_per_byte)


class SkippingDecoder:
    """Skips some ids."""

    def __init__(self, inner: TextDecoder, skipped: Collection[int]):
        self._inner, self._skipped = inner, frozenset(skipped)

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._inner.push(token_id)

    def flush(self) -> str:
        return self._inner.flush()


class SpacedDecoder:
    """Surrounds added tokens with spaces, as the slow tokenizers of transformers do.

    Args:
        inner: decodes each run of ids between added tokens separately.
        added: texts of the added tokens, by id.
    """

    def __init__(self, inner: TextDecoder, added: Mapping[int, str]):
        self._inner, self._added = inner, added
        self._start()

    def _start(self) -> None:
        self._is_first, self._run_ids, self._run_has_text = True, 0, False

    def push(self, token_id: int) -> str:
        if token_id in self._added:
            text = self._in_run(self._inner.flush())
            text += ("" if self._is_first and not self._run_has_text else " ") + self._added[token_id]
            self._is_first, self._run_ids, self._run_has_text = False, 0, False
            return text
        self._run_ids += 1
        return self._in_run(self._inner.push(token_id))

    def flush(self) -> str:
        text = self._in_run(self._inner.flush())
        if self._run_ids and not self._run_has_text and not self._is_first:
            text += " "
        self._start()
        return text

    def _in_run(self, text: str) -> str:
        if not text:
            return ""
        joint = "" if self._is_first or self._run_has_text else " "
        self._run_has_text = True
        return joint + text


_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# every character of these forms except the last
_UNSETTLED = " n'vr"


def clean_spaces(text: str) -> str:
    """Removes spaces before English punctuation: `clean_up_tokenization_spaces` of transformers."""
    for form in _CLEANED:
        text = text.replace(form, form.strip())
    return text


class CleaningDecoder:
    """Applies `clean_spaces` to the inner text. An end that later text may change is held back."""

    def __init__(self, inner: TextDecoder):
        self._inner, self._waiting = inner, ""

    def push(self, token_id: int) -> str:
        text = self._waiting + self._inner.push(token_id)
        # an incomplete form is a space and characters of _UNSETTLED
        space = text.find(" ", len(text.rstrip(_UNSETTLED)))
        settled = len(text) if space < 0 else space
        self._waiting = text[settled:]
        return clean_spaces(text[:settled])

    def flush(self) -> str:
        text, self._waiting = self._waiting + self._inner.flush(), ""
        return clean_spaces(text)


class PieceDecoder:
    """Joins SentencePiece pieces as the slow Llama tokenizer of transformers 4.37 does.

    The leading space of the text is dropped. With `legacy`, that after every control token is dropped too, and a run of
    pieces that ends at a control token gets a leading space.

    Args:
        pieces: text of every id.
        byte_values: values of the single-byte ids.
        control: ids that end a run.
        known: texts of the pieces.
    """

    def __init__(
        self,
        pieces: Mapping[int, str],
        byte_values: Mapping[int, int],
        control: Collection[int],
        *,
        known: Collection[str],
        legacy: bool,
    ):
        self._pieces, self._bytes, self._known = pieces, byte_values, known
        self._control, self._legacy = frozenset(control), legacy
        self._utf8 = Utf8Decoder(self._piece_bytes, errors="mindvlm_byte")
        self._start()

    def _start(self) -> None:
        self._num_ids, self._may_strip, self._after_control, self._held = 0, self._legacy, False, ""

    def _piece_bytes(self, token_id: int) -> bytes:
        if token_id in self._bytes:
            self._may_strip = False
            return bytes([self._bytes[token_id]])
        piece = self._pieces.get(token_id, "")
        if self._num_ids == 0 and piece.startswith(WORD_SPACE):
            piece = piece[1:]
            if piece not in self._known:
                # SentencePiece copies unknown pieces verbatim
                self._may_strip = self._may_strip and not piece
                return piece.encode()
        if self._may_strip and piece:
            piece, self._may_strip = piece.removeprefix(WORD_SPACE), False
        return piece.replace(WORD_SPACE, " ").encode()

    def push(self, token_id: int) -> str:
        if token_id not in self._control:
            text = self._utf8.push(token_id)
            self._num_ids, self._after_control = self._num_ids + 1, False
            return self._hold(text)
        text = self._held + self._utf8.flush()
        if self._legacy and self._num_ids and not self._after_control:
            text = " " + text
        self._held, self._may_strip, self._after_control = "", self._legacy, True
        self._num_ids += 1
        return text + self._pieces[token_id]

    def flush(self) -> str:
        text = self._held + self._utf8.flush()
        self._start()
        return text

    def _hold(self, text: str) -> str:
        # a later control token adds a leading space to this run
        if not (self._legacy and self._control):
            return text
        self._held += text
        return ""


class FusedDecoder:
    """Joins SentencePiece pieces as the decoder in Llama's tokenizer.json does.

    One leading space is dropped. A run of single bytes that is not UTF-8 becomes one U+FFFD per byte.
    """

    def __init__(self, pieces: Mapping[int, str], byte_values: Mapping[int, int]):
        self._pieces, self._bytes = pieces, byte_values
        self._run, self._is_first = b"", True

    def push(self, token_id: int) -> str:
        if token_id in self._bytes:
            self._run += bytes([self._bytes[token_id]])
            return ""
        return self._strip(self._end_run() + self._pieces.get(token_id, "").replace(WORD_SPACE, " "))

    def flush(self) -> str:
        text = self._strip(self._end_run())
        self._is_first = True
        return text

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        if text and self._is_first:
            text, self._is_first = text.removeprefix(" "), False
        return text
