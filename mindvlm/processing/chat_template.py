"""Chat templates as data, and one renderer per style.

The texts and the joints are those of the conversation file of the original Vary-toy program; a template's name is the
original's name for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mindvlm.errors import UserError
from mindvlm.processing.pieces import Piece

Message = str | Sequence[Piece] | None
"""What one side says. None: that side has the word, its turn is left open."""


@dataclass(frozen=True)
class ChatTemplate:
    """One way to write a conversation down as a prompt.

    Attributes:
        style: "chatml": role + message + separator. "colon_single": role + ": " + message + separator.
            "colon_pair": the same with `answer_separator` after answers. "caption": the images of the user's message,
            nothing else of it, then the answer.
        system: the system message without its marks. It is never armed.
        system_prefix: control text before the system message.
        roles: the header of the user and of the assistant.
        separator: what closes a turn (in "colon_pair": the user's turn).
        answer_separator: what closes an answer; it is also where generation stops.
        answer_joint: text between an answer and what closes it.
    """

    name: str
    style: str
    system: str
    roles: tuple[str, str]
    separator: str
    answer_separator: str
    system_prefix: str = ""
    answer_joint: str = ""


_CHATML = {
    "style": "chatml",
    "roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "separator": "<|im_end|>",
    "answer_separator": "<|im_end|>",
    "system_prefix": "<|im_start|>system\n",
}
_HUMAN_ASSISTANT = {
    "style": "colon_single",
    "roles": ("Human", "Assistant"),
    "separator": "###",
    "answer_separator": "###",
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
        ChatTemplate("mpt", system=_DETAILED, **_CHATML),
        ChatTemplate("qwen", system=_DETAILED, **_CHATML),
        ChatTemplate("mpt_eval", system="", **_CHATML),
        ChatTemplate("mpt_text", system=_MOSAIC_LIST, **_CHATML),
        ChatTemplate("mpt_multimodal", system=_VARY_LIST, **_CHATML),
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


def get_template(name: str) -> ChatTemplate:
    """The template of that name. Raises UserError that lists the known names."""
    if name not in TEMPLATES:
        raise UserError(f"chat template {name!r} is unknown; known are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def render(template: ChatTemplate, turns: Sequence[Message], *, empty_leaves_open: bool = False) -> list[Piece]:
    """The prompt of a conversation as pieces; `prompt_text` joins them.

    Args:
        turns: messages of user and assistant in turn, the user first. A string is the message as ordinary text; pieces
            may hold control text (an image span). A last None opens the assistant's turn.
        empty_leaves_open: treat an empty message like None, as the original program does. Otherwise it is a turn of
            its own with nothing in it.
    """
    pieces = render_system(template)
    for position, message in enumerate(turns):
        if empty_leaves_open and message is not None and not any(piece.text for piece in as_pieces(message)):
            message = None
        pieces += render_turn(template, message, is_answer=position % 2 == 1)
    return pieces


def render_system(template: ChatTemplate) -> list[Piece]:
    """What stands before the first turn."""
    if template.style == "caption" or (template.style == "chatml" and not template.system):
        return []
    first_joint = template.separator + ("\n" if template.style == "colon_single" else "")
    return [Piece(template.system_prefix, control=True), Piece(template.system), Piece(first_joint, control=True)]


def render_turn(template: ChatTemplate, message: Message, *, is_answer: bool) -> list[Piece]:
    """Header, message and closing mark of one turn. The message and mark of an answer are what training learns."""
    if template.style == "caption":
        return render_caption_turn(template, message, is_answer=is_answer)
    colon = "" if template.style == "chatml" else ":"
    pieces = [Piece(template.roles[is_answer] + colon, control=True)]
    if message is None:
        return pieces
    if colon:
        # learned with the answer, because a token may consist of the space and the answer's first word
        pieces.append(Piece(" ", control=True, learned=is_answer))
    pieces += [Piece(piece.text, control=piece.control, learned=is_answer) for piece in as_pieces(message)]
    closing = template.answer_separator if is_answer else template.separator
    return [*pieces, Piece(closing, control=True, learned=is_answer)]


def render_caption_turn(template: ChatTemplate, message: Message, *, is_answer: bool) -> list[Piece]:
    """Of what the user says only the images (Vary-tiny is shown pictures and asked nothing); answers whole."""
    if message is None:
        return []
    pieces = as_pieces(message)
    if not is_answer:
        return [piece for piece in pieces if piece.control]
    closing = [Piece(template.answer_joint), Piece(template.answer_separator, control=True)]
    return [Piece(piece.text, control=piece.control, learned=True) for piece in [*pieces, *closing]]


def as_pieces(message: str | Sequence[Piece]) -> Sequence[Piece]:
    """A message as pieces; a string becomes one piece of ordinary text."""
    return [Piece(message)] if isinstance(message, str) else message


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The prompt as one string."""
    return "".join(piece.text for piece in pieces)
