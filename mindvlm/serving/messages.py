"""The messages of a chat request as turns of a conversation."""

from dataclasses import dataclass, field
from typing import Any

from mindvlm.processing.images.image_span import IMAGE_MARKER, disarmed
from mindvlm.serving.errors import bad_field, shown
from mindvlm.serving.fields import Fields

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class PictureUrl:
    """The URL of a picture, and its place in the request for messages."""

    url: str
    param: str


Part = str | PictureUrl


@dataclass
class Dialogue:
    """A conversation that ends with a question.

    Attributes:
        system: the system message; None for that of the template.
        turns: (question, answer) of the earlier turns, and (question, None).
    """

    system: str | None = None
    turns: list[tuple[list[Part], str | None]] = field(default_factory=list)

    @property
    def pictures(self) -> list[PictureUrl]:
        return [part for question, _ in self.turns for part in question if isinstance(part, PictureUrl)]

    @property
    def texts(self) -> list[str]:
        """The system message, and the texts of the question and the answer of each turn."""
        texts = [self.system or ""]
        for question, answer in self.turns:
            texts += ["\n".join(part for part in question if isinstance(part, str)), answer or ""]
        return texts

    def questions(self, joint: str) -> list[str]:
        """Returns the questions with an `<image>` marker for each picture.

        As in training, the pictures of a question come first if its text is in one piece. Otherwise they stay where
        they are. `<image>` in a text marks no picture.

        Args:
            joint: text behind a picture.
        """
        return [marked(parts, joint) for parts, _ in self.turns]


def marked(parts: list[Part], joint: str) -> str:
    texts = [isinstance(part, str) for part in parts]
    changes = sum(texts[i] and not texts[i + 1] for i in range(len(texts) - 1)) + bool(texts and texts[-1])
    if changes <= 1:
        parts = sorted(parts, key=lambda part: isinstance(part, str))
    question = ""
    for previous, part in zip([None, *parts], parts, strict=False):
        if isinstance(part, str):
            question += ("\n" if isinstance(previous, str) else "") + disarmed(part)
        else:
            question += IMAGE_MARKER + joint
    return question


def read_messages(messages: Any) -> Dialogue:
    """Returns the conversation of `messages`.

    Messages of the same role in a row are joined by line breaks. System messages must come first.

    Raises:
        ApiError: a message has a wrong type or a role or part that this server does not support, or the last one is not
            a question.
    """
    if not isinstance(messages, list) or not messages:
        raise bad_field("messages", f"{shown(messages)}; expected a list of messages")
    turns: list[tuple[list[Part], list[str]]] = []
    systems: list[str] = []
    for number, message in enumerate(messages):
        fields = Fields(message, f"messages[{number}]")
        role = fields.text("role")
        if role in SYSTEM_ROLES:
            if turns:
                raise bad_field(fields.path("role"), f"{role!r} after other messages; system messages come first")
            systems += [read_text(fields)]
        elif role == "user":
            parts = read_parts(fields)
            if turns and not turns[-1][1]:
                turns[-1][0].extend(parts)
            else:
                turns.append((parts, []))
        elif role == "assistant":
            for key in ("tool_calls", "function_call", "audio"):
                fields.refuse(key, [], {})
            turns = turns or [([], [])]
            turns[-1][1].append(read_text(fields))
        else:
            roles = "system, developer, user or assistant"
            raise bad_field(fields.path("role"), f"{shown(role)}; this server supports {roles}")
    if not turns or turns[-1][1]:
        raise bad_field("messages", "the last message must be a question with the role user")
    # joined at the end, in linear time
    joined = [(question, "\n".join(answers) if answers else None) for question, answers in turns]
    return Dialogue("\n".join(systems) if systems else None, joined)


def read_text(fields: Fields) -> str:
    """Returns the content of a message of text alone."""
    parts = read_parts(fields)
    if not all(isinstance(part, str) for part in parts):
        role = fields.values["role"]
        raise bad_field(
            fields.path("content"), f"a picture in a message of the role {role!r}; only users show pictures"
        )
    return "\n".join(parts)


def read_parts(fields: Fields) -> list[Part]:
    """Returns the content of a message: a text, or a list of texts and pictures."""
    content = fields.get("content", (str, list), "a text or a list of parts")
    if isinstance(content, str):
        return [content]
    return [read_part(Fields(part, f"{fields.path('content')}[{number}]")) for number, part in enumerate(content or [])]


def read_part(fields: Fields) -> Part:
    kind = fields.text("type")
    if kind == "text":
        text = fields.text("text")
        if text is None:
            raise bad_field(fields.path("text"), "missing; expected a text")
        return text
    if kind != "image_url":
        raise bad_field(fields.path("type"), f"{shown(kind)} is not supported by this server; use text or image_url")
    url = fields.get("image_url", (str, dict), "an object with the key url")
    if not isinstance(url, str):
        url = Fields(url or {}, fields.path("image_url")).text("url")
    if not url:
        raise bad_field(fields.path("image_url"), "no url; give a data URL, data:image/png;base64,...")
    # half a surrogate pair has no place in a URL
    return PictureUrl(url.encode("utf-8", "replace").decode(), fields.path("image_url"))
