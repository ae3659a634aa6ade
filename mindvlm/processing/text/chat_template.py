"""Chat templates as data, and one renderer per style.

`TEMPLATES` are Vary's: texts and joints are those of the conversation file of the original Vary-toy program; a
template's name is the original's name for it. Other families have tables of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindvlm.core.errors import UserError
from mindvlm.processing.text.pieces import Piece

Message = str | Sequence[Piece] | None
"""What one side says. None: that side has the word, its turn is left open."""


@dataclass(frozen=True)
class ChatTemplate:
    """One way to write a conversation down as a prompt.

    Attributes:
        style: "chatml": role + message + separator. "colon_single": role + ": " + message + separator.
            "colon_pair": the same with `answer_separator` after answers. "caption": the images of the user's message,
            nothing else of it, then the answer. "instruction": Llama-2's, the question between two marks with the
            system message in the first one. "tagged": TinyLlama's, a tag on a line of its own before every part.
            "plain": the message and `separator`; it has no answers but in training, where it is "caption".
        system: the system message without its marks. It is never armed.
        system_prefix: control text before the system message.
        system_joint: text between what closes the system message and the first turn.
        roles: the header of the user and of the assistant ("instruction" and "tagged": names that are not shown).
        question_marks: text before and behind a question, and `answer_mark` text before an answer ("instruction" and
            "tagged").
        separator: what closes a turn (in "colon_pair": the user's turn; in "instruction" and "tagged": what opens
            every question but the first).
        answer_separator: what closes an answer; it is also where generation stops.
        answer_joint: text between an answer and what closes it.
        examples: turns before the first one, the user's first.
        label_rule: name of the rule of `label_rules` that the original labels samples by.
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
    label_rule: str = ""


CHATML = {
    "style": "chatml",
    "roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "separator": "<|im_end|>",
    "answer_separator": "<|im_end|>",
    "system_prefix": "<|im_start|>system\n",
    "label_rule": "mpt",
}
_HUMAN_ASSISTANT = {
    "style": "colon_single",
    "roles": ("Human", "Assistant"),
    "separator": "###",
    "answer_separator": "###",
    "system_joint": "\n",
}
_CAPTION = {
    "style": "caption",
    "roles": ("", ""),
    "separator": "",
    "answer_separator": "</s>",
    "answer_joint": "\n",
}
_USER_ASSISTANT = {
    "style": "colon_pair",
    "roles": ("USER", "ASSISTANT"),
    "separator": " ",
    "answer_separator": "</s>",
}

_DETAILED = "You should follow the instructions carefully and explain your answers in detail."
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VARY_ASSISTANT = (
    "You are vary, a large language and vision assistant trained by Foundation Model Group, Megvii Technology."
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.Follow the instructions carefully and explain your answers in detail."
)
_VARY_TEXT_ASSISTANT = (
    "You are vary, a large language model trained by Foundation Model Group, Megvii Technology."
    "You are designed to assist human with a variety of tasks using natural language."
    "Follow the instructions carefully."
)
_VARY_LIST = (
    "- You are vary, a large language and vision assistant trained by Foundation Model Group, Megvii Technology.\n"
    "- You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.\n"
    "- You should follow the instructions carefully and explain your answers in detail."
)
_MOSAIC_LIST = (
    "- You are a helpful assistant chatbot trained by MosaicML.\n"
    "- You answer questions.\n"
    "- You are excited to be able to help the user, but will refuse to do anything that could be considered harmful to "
    "the user.\n"
    "- You are more than just an information source, you are also able to write poetry, short stories, and make jokes."
)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("mpt", system=_DETAILED, **CHATML),
        ChatTemplate("qwen", system=_DETAILED, **CHATML),
        ChatTemplate("mpt_eval", system="", **CHATML),
        ChatTemplate("mpt_text", system=_MOSAIC_LIST, **CHATML),
        ChatTemplate("mpt_multimodal", system=_VARY_LIST, **CHATML),
        ChatTemplate("v1", system=_CURIOUS_USER, **_USER_ASSISTANT),
        ChatTemplate("vicuna_v1_1", system=_CURIOUS_USER, **_USER_ASSISTANT),
        ChatTemplate("baichuan", system=_CURIOUS_USER, **_USER_ASSISTANT),
        ChatTemplate("llava_v1", system=_VARY_ASSISTANT, **_USER_ASSISTANT),
        ChatTemplate("bair_v1", system="BEGINNING OF CONVERSATION:", **{**_USER_ASSISTANT, "roles": ("USER", "GPT")}),
        ChatTemplate("default", system=_VARY_ASSISTANT, **_HUMAN_ASSISTANT),
        ChatTemplate("simple", system="", **_HUMAN_ASSISTANT),
        ChatTemplate("multimodal", system="", **_HUMAN_ASSISTANT),
        ChatTemplate("simple_legacy", system=_VARY_TEXT_ASSISTANT, **_HUMAN_ASSISTANT),
        ChatTemplate("opt", system="", **_CAPTION),
    )
}


def get_template(name: str, templates: Mapping[str, ChatTemplate] = TEMPLATES) -> ChatTemplate:
    """The template of that name. Raises UserError that lists the known names."""
    if name not in templates:
        raise UserError(f"chat template {name!r} is unknown; known are {', '.join(sorted(templates))}")
    return templates[name]


def render(template: ChatTemplate, turns: Sequence[Message], *, empty_leaves_open: bool = False) -> list[Piece]:
    """The prompt of a conversation as pieces; `prompt_text` joins them.

    Args:
        turns: messages of user and assistant in turn, the user first. A string is the message as ordinary text; pieces
            may hold control text (an image span). A last None opens the assistant's turn.
        empty_leaves_open: treat an empty message like None, as the original program does. Otherwise it is a turn of
            its own with nothing in it.
    """
    pieces = render_system(template)
    for position, message in enumerate([*template.examples, *turns]):
        if empty_leaves_open and message is not None and is_empty(message):
            message = None
        pieces += render_turn(template, message, is_answer=position % 2 == 1, is_first=position == 0)
    return pieces


def render_system(template: ChatTemplate) -> list[Piece]:
    """What stands before the first turn."""
    if not template.style.startswith(("chatml", "colon")) or (template.style == "chatml" and not template.system):
        return []
    first_joint = template.separator + template.system_joint
    return [Piece(template.system_prefix, control=True), Piece(template.system), Piece(first_joint, control=True)]


def render_turn(template: ChatTemplate, message: Message, *, is_answer: bool, is_first: bool = False) -> list[Piece]:
    """Header, message and closing mark of one turn. The message and mark of an answer are what training learns.

    Raises:
        UserError: the style cannot write such a turn down.
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
        # learned with the answer, because a token may consist of the space and the answer's first word
        pieces.append(Piece(" ", control=True, learned=is_answer))
    pieces += as_pieces(message, learned=is_answer)
    closing = template.answer_separator if is_answer else template.separator
    return [*pieces, Piece(closing, control=True, learned=is_answer)]


def render_llama_turn(template: ChatTemplate, message: Message, *, is_answer: bool, is_first: bool) -> list[Piece]:
    """The system message goes into the first question; "tagged" writes the answer's header into open turns too."""
    is_tagged = template.style == "tagged"
    if is_answer:
        if message is None and not is_tagged:
            return []
        # as in the other styles, a space is learned with the answer and a header is not
        pieces = [Piece(template.answer_mark, control=True, learned=not is_tagged)]
        if message is None:
            return pieces
        end = [Piece(template.answer_joint, control=True, learned=True)]
        end += [Piece(template.answer_separator, control=True, learned=True)]
        return [*pieces, *as_pieces(message, learned=True), *end]
    if is_first and (message is None or is_empty(message)):
        raise UserError(f"chat template {template.name!r}: the first question is empty; it carries the system message")
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
    # Llama-2 has the system message between the question's marks, TinyLlama before them
    parts = [*system, before] if is_tagged else [before, *system]
    return [Piece(opening, control=True), *parts, *as_pieces(message), behind]


def render_plain_turn(template: ChatTemplate, message: Message, *, is_answer: bool) -> list[Piece]:
    """The message and the separator."""
    if message is None:
        return []
    if is_answer:
        raise UserError(f"chat template {template.name!r} has no turns; ask without a history, or choose another one")
    return [*as_pieces(message), Piece(template.separator, control=True)]


def render_caption_turn(template: ChatTemplate, message: Message, *, is_answer: bool) -> list[Piece]:
    """Of what the user says only the images (Vary-tiny is shown pictures and asked nothing); answers whole."""
    if message is None:
        return []
    pieces = as_pieces(message)
    if not is_answer:
        return [piece for piece in pieces if piece.control]
    closing = [Piece(template.answer_joint), Piece(template.answer_separator, control=True)]
    return as_pieces([*pieces, *closing], learned=True)


def as_pieces(message: str | Sequence[Piece], *, learned: bool = False) -> list[Piece]:
    """A message as pieces; a string becomes one piece of ordinary text."""
    pieces = [Piece(message)] if isinstance(message, str) else message
    return [Piece(piece.text, control=piece.control, learned=learned) for piece in pieces]


def is_empty(message: str | Sequence[Piece]) -> bool:
    """Whether there is no text in it."""
    return not any(piece.text for piece in as_pieces(message))


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The prompt as one string."""
    return "".join(piece.text for piece in pieces)
