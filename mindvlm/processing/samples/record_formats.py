"""Formats of training records: where a record keeps its pictures, its turns and its system message.

A format is data. All formats accept the usual spellings of keys and speakers. What cannot be used is an error that
names it, so that no picture is lost in silence.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mindvlm.core.errors import UserError
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.samples.chat_samples import SPEAKERS

SYSTEM = "system"
SPEAKER_NAMES = {
    **dict.fromkeys(("human", "user"), SPEAKERS[0]),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), SPEAKERS[1]),
    SYSTEM: SYSTEM,
}
"""Name of a speaker in records -> speaker."""

TURN_KEYS = ("conversations", "messages", "conversation", "dialogue")
SPEAKER_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content", "text")
PICTURE_KEYS = ("image", "images", "image_path", "image_paths", "image_file", "img")
SYSTEM_KEYS = ("system", "system_prompt")
UNUSED_MEDIA = ("video", "videos", "audio", "audios")
NAME_KEYS = ("path", "url", "uri", "src", "file", "file_name", "filename", "bytes", "base64")
_PICTURE_NAME = re.compile(
    r"data:image/.*|[^\n]+\.(?:jpe?g?|jfif|jp2|j2k|jpx|jxl|a?png|webp|bmp|dib|gif|tiff?|hei[cf]|hif|avif|p[bgnp]m|tga|ico|"
    r"svg|dng|dcm)(?:\?\S*)?",
    re.IGNORECASE,
)
_PICTURE_KEY = re.compile(
    r"(?!(?:has|is|no|num)_)(?:[a-z]+_)?(?:image|img|pic|picture|photo)s?(?:_?(?:path|url|uri|file|name|filename)s?)?",
    re.IGNORECASE,
)
# provenance and texts: a picture that they name is not part of the record
_OTHER_KEY = re.compile(
    r".*id|(?:.*_)?(?:source|url|uri|link|origin|thumbnail|license|meta|metadata|tag|prompt|question|answer|text|"
    r"caption|title|description)s?(?:_.*)?",
    re.IGNORECASE,
)
_MEDIA_MARK = re.compile(r"^\s*<(video|audio)>|\n\s*<(video|audio)>\s*$")


class Turn(NamedTuple):
    """One message of a record: the speaker, one of SPEAKERS, and a text or a number."""

    speaker: str
    text: str | int | float


@dataclass(frozen=True)
class Record:
    """The parts of a record. `system` is "" for the template's own system message."""

    images: list[str]
    turns: list[Turn]
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordFormat:
    """One format of records.

    Attributes:
        question, answer: keys of the two texts of a record with a single exchange; None for a list of turns.
        line_break: text in answers that stands for a newline.
        follows_llava: pictures are matched with their marks as LLaVA does: several marks of the only picture in a
            question are one, a picture without a mark is not shown, and a mark without a picture is text. Otherwise the
            first two are errors, and so is a mark without a picture that is alone on the first line of a question.
    """

    question: str | None = None
    answer: str | None = None
    line_break: str | None = None
    follows_llava: bool = False

    def read(self, record: Any) -> Record:
        """Returns the parts of a record.

        Raises:
            UserError: a part is missing or has another type, or the record shows a video, or a picture under a key that
                is not read.
        """
        found = self._exchange(record) if self.answer else _conversation(record)
        if isinstance(record, dict):
            _refuse_other_media(record)
            if not found.images:
                _refuse_unread_pictures(record, besides=(self.question, self.answer))
        for turn in found.turns:
            if turn.speaker == SPEAKERS[0] and (mark := _MEDIA_MARK.search(str(turn.text))):
                raise UserError(f"shows {mark[0].strip()}; training uses pictures only, remove the record")
        return found

    def _exchange(self, record: Any) -> Record:
        if not isinstance(record, dict) or not isinstance(record.get(self.answer), str):
            raise UserError(
                f"expected {{'image': name, {self.question!r}: text, {self.answer!r}: text}}; is the format of the "
                "registry right?"
            )
        answer = record[self.answer].replace(self.line_break, "\n") if self.line_break else record[self.answer]
        question = str(record.get(self.question) or "")
        return Record(_pictures(record), [Turn(SPEAKERS[0], question), Turn(SPEAKERS[1], answer)], _system(record))


def first_of(record: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, Any]:
    """Returns the first key whose value is not empty, and the value; ("", None) without one."""
    for key in keys:
        if record.get(key) not in (None, False, "", [], [None], {}):
            return key, record[key]
    return "", None


def _conversation(record: Any) -> Record:
    record = {TURN_KEYS[0]: record} if isinstance(record, list) else record
    entries = first_of(record, TURN_KEYS)[1] if isinstance(record, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            "expected {'image': name, 'conversations': [{'from', 'value'}, ...]} with at least one turn, or 'messages' "
            f"of {{'role', 'content'}}; found {_short(list(record) if isinstance(record, dict) else record)}"
        )
    shown: list[Any] = []
    turns = [_turn(entry, number, shown) for number, entry in enumerate(entries)]
    system = _system(record)
    if turns[0].speaker == SYSTEM:
        leading = str(turns.pop(0).text)
        if system and leading and system != leading:
            raise UserError("has two different system messages, a key and a turn; keep one")
        system = leading or system
    for number, turn in enumerate(turns, start=len(entries) - len(turns)):
        if turn.speaker == SYSTEM:
            raise UserError(f"turn {number}: a system message, which can only be the first turn; move or remove it")
    images, named = _pictures(record), [name for one in shown if one is not None for name in _names("content", one)]
    if images and named and images != named:
        raise UserError(f"names pictures twice, {_short(images)} and in its turns {_short(named)}; keep one")
    return Record(images or named, turns, system)


def _turn(entry: Any, number: int, shown: list[Any]) -> Turn:
    """Reads one turn; appends what its parts show to `shown`, None for a picture that the record names elsewhere."""
    values = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
    name = next((values[key] for key in SPEAKER_KEYS if key in values), None)
    text = next((values[key] for key in TEXT_KEYS if key in values), None)
    speaker = SPEAKER_NAMES.get(name.lower()) if isinstance(name, str) else None
    if isinstance(text, list) and speaker:
        text = _joined_parts(text, number, shown)
    if speaker is None or not isinstance(text, str | int | float) or isinstance(text, bool):
        raise UserError(
            f"turn {number}: expected {{'from': 'human' or 'gpt', 'value': text}} or {{'role': 'user' or 'assistant', "
            f"'content': text}}, found {_short(entry)}"
        )
    return Turn(speaker, text)


def _joined_parts(parts: list[Any], number: int, shown: list[Any]) -> str:
    """Joins a content list of texts and pictures to a text with marks."""
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or (kind == "text" and isinstance(part.get("text"), str)):
            more = part if isinstance(part, str) else part["text"]
        elif kind in ("image", "image_url"):
            shown.append(first_of(part, (kind, "image", "path", "url"))[1])
            more = IMAGE_MARKER
        else:
            raise UserError(f"turn {number}: part {_short(part)}; expected {{'type': 'text'}} or {{'type': 'image'}}")
        is_beside_picture = IMAGE_MARKER in (more, text[-len(IMAGE_MARKER) :])
        touches = bool(text and more) and not (text[-1].isspace() or more[0].isspace())
        text += "\n" + more if is_beside_picture and touches else more
    return text


def _pictures(record: Mapping[str, Any]) -> list[str]:
    found = {key: _names(key, record[key]) for key in PICTURE_KEYS if key in record}
    lists = [names for names in found.values() if names]
    if any(names != lists[0] for names in lists[1:]):
        raise UserError(f"names different pictures under {' and '.join(map(repr, found))}; keep one key")
    return lists[0] if lists else []


def _names(key: str, value: Any) -> list[str]:
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    # data sets of Hugging Face keep a path within a mapping
    names = [first_of(one, ("path", "url"))[1] if isinstance(one, dict) else one for one in names]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{key!r} is {_short(value)}; expected the name of a picture, or a list of names")
    return names


def _system(record: Mapping[str, Any]) -> str:
    key, value = first_of(record, SYSTEM_KEYS)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key!r} is {_short(value)}; expected a text")
    return value or ""


def _refuse_other_media(record: Mapping[str, Any]) -> None:
    key, value = first_of(record, UNUSED_MEDIA)
    if key:
        raise UserError(f"{key!r} is {_short(value)}; training uses pictures only, remove the record")


def _refuse_unread_pictures(record: Mapping[str, Any], besides: Sequence[str | None]) -> None:
    """Raises UserError for a picture under a key that is not read, of the record or of one of its turns.

    Args:
        besides: keys of the record's texts.
    """
    texts = (*besides, *TURN_KEYS, *SYSTEM_KEYS)
    for key, name in _named_pictures("", {key: value for key, value in record.items() if key not in texts}):
        raise UserError(f"{key!r} is the picture {_short(name)}, but pictures are read from 'image'; rename the key")
    turns = first_of(record, TURN_KEYS)[1]
    for turn in turns if isinstance(turns, list) else ():
        values = {key: value for key, value in turn.items() if key not in (*SPEAKER_KEYS, *TEXT_KEYS)}
        for key, name in _named_pictures("", values):
            raise UserError(
                f"{key!r} of a turn is the picture {_short(name)}, but pictures are read from 'image' of the record; "
                "move it there"
            )


def _named_pictures(key: str, value: Any, *, is_other: bool = False) -> Iterator[tuple[str, str]]:
    """Yields key and name of the pictures in a value, which may be nested.

    A key such as `photo` names a picture whatever its value; another one if the value is a picture's name, unless it is
    provenance or a text.

    Args:
        is_other: whether the value is within such a key.
    """
    is_other = is_other or bool(_OTHER_KEY.fullmatch(key))
    if isinstance(value, list):
        for one in value:
            yield from _named_pictures(key, one, is_other=is_other)
    elif isinstance(value, dict):
        for inner, one in value.items():
            name = key if key and str(inner).lower() in NAME_KEYS else str(inner)
            yield from _named_pictures(name, one, is_other=is_other)
    elif isinstance(value, str) and value:
        if _PICTURE_KEY.fullmatch(key) or (not is_other and _PICTURE_NAME.fullmatch(value)):
            yield key, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
