"""Prompts of requests: ids and decoded pictures."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mindvlm.core.errors import UserError
from mindvlm.processing.chat_processor import ChatPrompt
from mindvlm.processing.images.picture import Picture, branches_of
from mindvlm.serving.errors import ApiError, bad_field
from mindvlm.serving.messages import Dialogue, PictureUrl
from mindvlm.serving.pictures import check_format
from mindvlm.sessions.vision_language_model import VisionLanguageModel

LARGE_PIXELS = 4_000_000
"""A picture with more pixels takes some tenths of a second to decode and resize."""


class LargePictureError(Exception):
    """A picture has more than `LARGE_PIXELS`."""


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
        """Size of the pixels."""
        return sum(map(pixel_bytes, self.pictures))


def pixel_bytes(picture: Picture) -> int:
    """Returns the size of the pixels of all views."""
    return sum(array.nbytes for view in picture.views for array in branches_of(view).values())


class PictureCache:
    """Recently decoded pictures by the digest of their files; threads share it.

    Args:
        max_bytes: limit of the pixels that are kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.pictures: OrderedDict[bytes, tuple[Picture, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, content: bytes, decode: Callable[[bytes], Picture]) -> Picture:
        """Returns the picture of a file, decoded if it is not kept."""
        digest = hashlib.sha256(content).digest()
        with self.lock:
            if digest in self.pictures:
                self.pictures.move_to_end(digest)
                return self.pictures[digest][0]
        picture = decode(content)
        # computed here, because the scheduler needs them while other answers wait
        _ = picture.digests
        size = pixel_bytes(picture)
        with self.lock:
            if digest not in self.pictures:
                self.pictures[digest] = picture, size
                self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self.pictures.popitem(last=False)[1][1]
        return picture


def chat_prompt(
    model: VisionLanguageModel,
    dialogue: Dialogue,
    contents: Sequence[bytes],
    cache: PictureCache,
    *,
    takes_large: bool = False,
) -> Prompt:
    """Returns the prompt of a conversation.

    Args:
        contents: the files of `dialogue.pictures`.
        cache: the decoded pictures.
        takes_large: whether pictures of more than `LARGE_PIXELS` are decoded.

    Raises:
        ApiError: a picture cannot be read, the template has no place for a message, or the prompt exceeds the context.
        LargePictureError: a picture that is not in the cache is large, and `takes_large` is False.
    """
    processor = model.processor
    check_size(model, dialogue.texts, "messages")
    if dialogue.system is not None and not processor.template.has_system:
        raise bad_field("messages", f"the template {processor.template.name!r} of this model has no system message")
    *earlier, question = dialogue.questions(processor.image_joint)
    history = [(asked, answer) for asked, (_, answer) in zip(earlier, dialogue.turns, strict=False)]

    # not the dialogue, whose data URLs would be kept until the answer ends
    system = dialogue.system

    def prompter(counts: Sequence[int]) -> ChatPrompt:
        return processor.prompt(question, num_images=len(counts), history=history, image_lengths=counts, system=system)

    files = zip(dialogue.pictures, contents, strict=True)
    pictures = [read_picture(model, *file, cache, takes_large=takes_large) for file in files]
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
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    # a template adds at least one token to a question and its answer
    fewest = max(num_bytes // model.processor.tokenizer.max_token_bytes, len(texts) // 2)
    if fewest > model.engine.max_length:
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


def read_picture(
    model: VisionLanguageModel, url: PictureUrl, content: bytes, cache: PictureCache, *, takes_large: bool
) -> Picture:
    """Decodes a picture and cuts it into views. Raises ApiError if it cannot be read or exceeds a limit, and
    `LargePictureError` as `chat_prompt`."""

    def decode(content: bytes) -> Picture:
        if check_format(content) > LARGE_PIXELS and not takes_large:
            raise LargePictureError
        return model.processor.picture(content)

    try:
        return cache.get(content, decode)
    except UserError as error:
        raise bad_field(url.param, str(error).removeprefix("the image: ")) from None
