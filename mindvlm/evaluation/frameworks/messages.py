"""Messages of evaluation frameworks as a query with pictures and earlier turns."""

from collections.abc import Iterable, Sequence
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.image_span import IMAGE_MARKER

Part = tuple[str, Any]
"""A part of a message: the kind, "text" or "image", and the text or picture."""
Asked = tuple[str, list[Any], list[tuple[str, str]]]
"""Query, pictures and history, as in `VisionLanguageModel.chat`."""


def read_messages(messages: Iterable[tuple[str, Sequence[Part]]], processor: ChatProcessor) -> Asked:
    """Returns the last question of a conversation, all its pictures and its earlier turns.

    Pictures before the text of a message take the place that the model's processor gives them, others stay in place.
    Consecutive messages of one role are joined. A system message precedes the text of the first question, because the
    templates of the models contain their own.

    Args:
        messages: pairs of a role, "system", "user" or "assistant", and parts.

    Raises:
        UserError: a part is neither text nor a picture, the roles do not end with a question, or the numbers of
            pictures and markers differ.
    """
    turns: list[list[Part]] = []
    system: list[Part] = []
    for role, parts in messages:
        check_kinds(parts)
        if role == "system":
            system += [*parts, ("text", "\n")]
        elif (role == "assistant") == len(turns) % 2:
            turns.append(list(parts))
        elif turns:
            turns[-1] += [("text", "\n"), *parts]
        else:
            raise UserError(f"the conversation begins with a message of {role!r}; expected one of 'user'")
    if len(turns) % 2 == 0:
        raise UserError("the conversation does not end with a message of 'user'; remove the answer at its end")
    leading = num_leading_pictures(turns[0])
    turns[0][leading:leading] = system
    texts = [text_of(parts) if number % 2 else question_text(parts, processor) for number, parts in enumerate(turns)]
    pictures = [picture for parts in turns for kind, picture in parts if kind == "image"]
    return texts[-1], pictures, list(zip(texts[:-1:2], texts[1::2], strict=True))


def check_kinds(parts: Sequence[Part]) -> None:
    """Raises UserError if a part is neither text nor a picture."""
    kind = next((kind for kind, _ in parts if kind not in ("text", "image")), None)
    if kind:
        raise UserError(f"a message contains {kind!r}; models of mindvlm read text and pictures; choose another task")


def question_text(parts: Sequence[Part], processor: ChatProcessor) -> str:
    """Returns the text of a question with one marker for each picture."""
    text, num_pictures = text_of(parts), sum(kind == "image" for kind, _ in parts)
    if num_leading_pictures(parts) == num_pictures or processor.num_markers(text):
        return processor.mark_images(text, num_pictures)
    return "".join(value if kind == "text" else IMAGE_MARKER for kind, value in parts)


def text_of(parts: Sequence[Part]) -> str:
    """Returns the joined texts of a message."""
    return "".join(value for kind, value in parts if kind == "text")


def num_leading_pictures(parts: Sequence[Part]) -> int:
    """Returns the number of pictures before the first text."""
    return next((number for number, (kind, _) in enumerate(parts) if kind == "text"), len(parts))
