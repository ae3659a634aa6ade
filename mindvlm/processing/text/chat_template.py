"""Chat templates as data, with a renderer for each style. Each family defines its own templates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mindvlm.core.errors import UserError
from mindvlm.processing.text.pieces import Piece

Message = str | Sequence[Piece] | None
"""The message of one turn. None leaves the turn open."""


@dataclass(frozen=True)
class LabelRule:
    """The rule by which an original program labels a prompt, see `mindvlm.processing.samples.label_rules`.

    Attributes:
        kind: "rounds" splits the text of the prompt at the closing marks of rounds, as the other attributes say;
            "messages" adds the lengths of the messages; "picture" learns one answer to a picture.
        header: text between question and answer; a round without exactly one header ends the count.
        start: number of tokens before the first round (the beginning mark).
        closing: number of tokens of the closing mark of a round, or "counted" for those of its text.
        shared: number of tokens at the end of the header that belong to the answer, plus beginning marks counted twice.
        counts_ends: whether end marks have the id of padding and are counted separately.
        continues: whether later rounds are one token shorter if the tokenizer continues text after control tokens.
    """

    kind: Literal["rounds", "messages", "picture"] = "rounds"
    header: str = ""
    start: int = 0
    closing: int | Literal["counted"] = 0
    shared: int = 0
    counts_ends: bool = False
    continues: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """The format of a conversation as a prompt.

    Attributes:
        style: "chatml": role + message + separator. "colon_single": role + ": " + message + separator.
            "colon_pair": "colon_single" with `answer_separator` after answers. "caption": only the images of the user's
            message, then the answer. "instruction": Llama-2, each question between two marks, the system message within
            the first ones. "tagged": TinyLlama, a tag on its own line before every part. "plain": the message and
            `separator`, without answers; training treats it as "caption".
        system: the system message without marks. Control tokens in it are disarmed.
        system_prefix: control text before the system message.
        system_joint: text between the closing mark of the system message and the first turn.
        roles: headers of the user and the assistant (unused by "instruction" and "tagged").
        question_marks: text before and after a question ("instruction" and "tagged").
        answer_mark: text before an answer ("instruction" and "tagged").
        separator: closing mark of a turn ("colon_pair": of the user's turn; "instruction" and "tagged": opening mark of
            every question except the first).
        answer_separator: closing mark of an answer, at which generation stops.
        answer_joint: text between an answer and its closing mark.
        examples: turns before the first one, starting with the user.
        label_rule: the original program's rule; None for a template that no program trains with.
    """

    name: str
    style: str
    system: str
    roles: tuple[str, str]
    separator: str
    answer_separator: str
    question_marks: tuple[str, str] = ("", "")
    answer_mark: str = ""
    system_prefix: str = ""
    system_joint: str = ""
    answer_joint: str = ""
    examples: tuple[str, ...] = ()
    label_rule: LabelRule | None = None

    @property
    def has_system(self) -> bool:
        """Whether the prompt has a place for a system message."""
        return self.style.startswith(("chatml", "colon")) or bool(self.system_prefix)


CHATML = {
    "style": "chatml",
    "roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "separator": "<|im_end|>",
    "answer_separator": "<|im_end|>",
    "system_prefix": "<|im_start|>system\n",
    "label_rule": LabelRule(header="{separator}{answerer}", closing="counted"),
}


def get_template(name: str, templates: Mapping[str, ChatTemplate]) -> ChatTemplate:
    """Returns the template of a name. Raises UserError, which lists the known names, if there is none."""
    if name not in templates:
        raise UserError(f"chat template {name!r} is unknown; known are {', '.join(sorted(templates))}")
    return templates[name]


def render(template: ChatTemplate, turns: Sequence[Message], *, empty_leaves_open: bool = False) -> list[Piece]:
    """Returns the prompt of a conversation as pieces.

    Args:
        turns: alternating messages, starting with the user. A string is ordinary text; pieces may contain control text,
            such as an image span. A final None opens the assistant's turn.
        empty_leaves_open: whether an empty message leaves its turn open, as in the original programs.
    """
    pieces = render_system(template)
    for position, message in enumerate([*template.examples, *turns]):
        if empty_leaves_open and message is not None and is_empty(message):
            message = None
        pieces += render_turn(template, message, is_answer=position % 2 == 1, is_first=position == 0)
    return pieces


def render_system(template: ChatTemplate) -> list[Piece]:
    """Returns the pieces before the first turn."""
    if not template.style.startswith(("chatml", "colon")) or (template.style == "chatml" and not template.system):
        return []
    first_joint = template.separator + template.system_joint
    return [Piece(template.system_prefix, control=True), Piece(template.system), Piece(first_joint, control=True)]


def render_turn(template: ChatTemplate, message: Message, *, is_answer: bool, is_first: bool = False) -> list[Piece]:
    """Returns the header, message and closing mark of one turn. An answer and its mark are learned.

    Raises:
        UserError: the style does not support the turn.
    """
    if template.style == "caption":
        return render_caption_turn(template, message, is_answer=is_answer)
    if template.style == "plain":
        return render_plain_turn(template, message, is_answer=is_answer)
    if template.style in ("instruction", "tagged"):
        return render_llama_turn(template, message, is_answer=is_answer, is_first=is_first)
    colon = "" if template.style == "chatml" else ":"
    pieces = [Piece(template.roles[is_answer] + colon, control=True)]
    if message is None:
        return pieces
    if colon:
        # learned with the answer, because one token may contain the space and the first word
        pieces.append(Piece(" ", control=True, learned=is_answer))
    pieces += as_pieces(message, learned=is_answer)
    closing = template.answer_separator if is_answer else template.separator
    return [*pieces, Piece(closing, control=True, learned=is_answer)]


def render_llama_turn(template: ChatTemplate, message: Message, *, is_answer: bool, is_first: bool) -> list[Piece]:
    """Returns a turn. The first question includes the system message; "tagged" has a header for an open answer."""
    is_tagged = template.style == "tagged"
    if is_answer:
        if message is None and not is_tagged:
            return []
        # as in other styles, a space is learned with the answer, a header is not
        pieces = [Piece(template.answer_mark, control=True, learned=not is_tagged)]
        if message is None:
            return pieces
        end = [Piece(template.answer_joint, control=True, learned=True)]
        end += [Piece(template.answer_separator, control=True, learned=True)]
        return [*pieces, *as_pieces(message, learned=True), *end]
    if is_first and (message is None or is_empty(message)):
        raise UserError(
            f"chat template {template.name!r}: the first question is empty; it must follow the system message"
        )
    if message is None:
        return []
    opening = "" if is_first else template.separator
    system = []
    if is_first and template.system:
        system = [
            Piece(template.system_prefix, control=True),
            Piece(template.system),
            Piece(template.system_joint, control=True),
        ]
    before, behind = (Piece(mark, control=True) for mark in template.question_marks)
    # the system message is between the marks of the question in Llama-2, before them in TinyLlama
    parts = [*system, before] if is_tagged else [before, *system]
    return [Piece(opening, control=True), *parts, *as_pieces(message), behind]


def render_plain_turn(template: ChatTemplate, message: Message, *, is_answer: bool) -> list[Piece]:
    """Returns the message and the separator."""
    if message is None:
        return []
    if is_answer:
        raise UserError(f"chat template {template.name!r} has no turns; ask without a history, or choose another")
    return [*as_pieces(message), Piece(template.separator, control=True)]


def render_caption_turn(template: ChatTemplate, message: Message, *, is_answer: bool) -> list[Piece]:
    """Returns only the images of a user's message, or the whole answer."""
    if message is None:
        return []
    pieces = as_pieces(message)
    if not is_answer:
        return [piece for piece in pieces if piece.control]
    closing = [Piece(template.answer_joint), Piece(template.answer_separator, control=True)]
    return as_pieces([*pieces, *closing], learned=True)


def as_pieces(message: str | Sequence[Piece], *, learned: bool = False) -> list[Piece]:
    """Returns a message as pieces. A string becomes one piece of ordinary text."""
    pieces = [Piece(message)] if isinstance(message, str) else message
    return [Piece(piece.text, control=piece.control, learned=learned) for piece in pieces]


def is_empty(message: str | Sequence[Piece]) -> bool:
    """Whether the message has no text."""
    return not any(piece.text for piece in as_pieces(message))


def prompt_text(pieces: Sequence[Piece]) -> str:
    """Joins the pieces of a prompt."""
    return "".join(piece.text for piece in pieces)
