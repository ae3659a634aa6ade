"""Prompts of requests: ids and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mindvlm.core.errors import UserError
from mindvlm.processing.chat_processor import ChatPrompt
from mindvlm.processing.images.picture import Picture, branches_of
from mindvlm.serving.errors import ApiError, bad_field
from mindvlm.serving.messages import Dialogue
from mindvlm.sessions.vision_language_model import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt before its pictures are encoded.

    Attributes:
        ids: with one placeholder for each row of a picture's layout.
        pictures: in the order of their placeholders.
        prompter: returns the prompt for other numbers of placeholders; None without pictures.
    """

    ids: list[int]
    pictures: list[Picture] = field(default_factory=list)
    prompter: Callable[[Sequence[int]], ChatPrompt] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the pictures."""
        return sum(map(picture_bytes, self.pictures))


def picture_bytes(picture: Picture) -> int:
    """Returns the size of the features of a picture, or else of the pixels of its views."""
    if picture.features is not None:
        return picture.features.nbytes
    return sum(array.nbytes for view in picture.views for array in branches_of(view).values())


def check_dialogue(model: VisionLanguageModel, dialogue: Dialogue) -> None:
    """Raises ApiError if a conversation cannot have a prompt, whatever its pictures."""
    check_size(model, dialogue.texts, "messages")
    template = model.processor.template
    if dialogue.system is not None and not template.has_system:
        raise bad_field("messages", f"the template {template.name!r} of this model has no system message")


def chat_prompt(model: VisionLanguageModel, dialogue: Dialogue, pictures: list[Picture]) -> Prompt:
    """Returns the prompt of a conversation.

    Args:
        pictures: those of `dialogue.pictures`.

    Raises:
        ApiError: the template needs a picture, or the prompt exceeds the context.
    """
    processor = model.processor
    *earlier, question = dialogue.questions(processor.image_joint)
    history = [(asked, answer) for asked, (_, answer) in zip(earlier, dialogue.turns, strict=False)]

    # not the dialogue, whose data URLs would be kept until the answer ends
    system = dialogue.system

    def prompter(counts: Sequence[int]) -> ChatPrompt:
        return processor.prompt(question, num_images=len(counts), history=history, image_lengths=counts, system=system)

    try:
        ids = prompter([len(picture.layout) for picture in pictures]).input_ids
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    return checked(model, Prompt(ids=ids, pictures=pictures, prompter=prompter), "messages")


def text_prompt(model: VisionLanguageModel, text: str) -> Prompt:
    """Returns the prompt of a text that the model continues, without a template. Errors as in `chat_prompt`."""
    check_size(model, [text], "prompt")
    tokenizer = model.processor.tokenizer
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
    if not ids:
        raise bad_field("prompt", "no tokens; give a text")
    return checked(model, Prompt(ids=ids), "prompt")


def check_size(model: VisionLanguageModel, texts: Sequence[str], param: str) -> None:
    """Raises ApiError if texts exceed the context even in the longest tokens. Tokenizing large texts takes long."""
    longest, limit = model.processor.tokenizer.max_token_bytes, model.engine.max_length
    num_bytes = sum(map(len, texts))
    # counting the bytes of a text of many characters would delay other requests
    if num_bytes <= longest * limit:
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    # a template adds at least one token to a question and its answer
    fewest = max(num_bytes // longest, len(texts) // 2)
    if fewest > limit:
        raise too_long(model, f"at least {fewest}", param)


def checked(model: VisionLanguageModel, prompt: Prompt, param: str) -> Prompt:
    """Returns the prompt. Raises ApiError if it exceeds the context."""
    if len(prompt.ids) > model.engine.max_length:
        raise too_long(model, str(len(prompt.ids)), param)
    return prompt


def too_long(model: VisionLanguageModel, length: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param}: the prompt has {length} tokens but the context of this model holds {model.engine.max_length}; "
        "shorten it",
        param=param,
        code="context_length_exceeded",
    )
