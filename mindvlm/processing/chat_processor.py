"""From questions, earlier turns and the number of their pictures to ids: what the processors of all families share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageRows, ImageSpan
from mindvlm.processing.images.loading import ImageSource
from mindvlm.processing.samples.chat_samples import TrainingSample, build_sample
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render, render_turn
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.processing.text.tokenizer import Tokenizer

History = Sequence[tuple[str, str]]
"""Earlier turns as (query, reply). Images of a query are marked in it, see `ChatProcessor.mark_images`."""


@dataclass(frozen=True)
class ChatPrompt:
    """Token ids of a prompt.

    Attributes:
        text: the prompt with all placeholders, without the tokens that the tokenizer puts in front of every text.
        placeholder_starts: for each image the index of its first placeholder in `input_ids`.
        image_lengths: for each image the number of its placeholders; they stand side by side.
    """

    text: str
    input_ids: list[int]
    placeholder_starts: list[int]
    image_lengths: list[int]


class ChatProcessor:
    """Base of a family's processor; a subclass defines `pixels`, what its towers see of a picture as a whole.

    What people and the model wrote is encoded with control tokens disarmed; only the template's own are armed.

    Args:
        tokenizer: has the tokens of the image span.
        image_joint: text between an image and the question where the question has no `<image>` marker of its own.

    Attributes:
        cuts_samples: whether `training_sample` cuts long samples by a rule of its own, so that nothing else may.

    Raises:
        UserError: the vocabulary lacks a token that is needed.
    """

    cuts_samples: bool = False

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, image_span: ImageSpan, *, image_joint: str):
        self.tokenizer, self.template, self.image_span = tokenizer, template, image_span
        self.image_joint = image_joint
        for token in (*image_span.tokens, tokenizer.end_token):
            tokenizer.special_id(token)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's closing mark, if it is a token, and the end of text."""
        special_ids = self.tokenizer.special_ids
        marks = dict.fromkeys((self.template.answer_separator, self.tokenizer.end_token))
        return tuple(special_ids[mark] for mark in marks if mark in special_ids)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The closing mark, where it is no single token of this vocabulary."""
        mark = self.template.answer_separator
        return () if mark in self.tokenizer.special_ids else (mark,)

    @property
    def picture_lengths(self) -> tuple[int, int]:
        """Placeholders of a small picture and of a large one; pictures that leave margins may have fewer."""
        return self.image_span.num_tokens, self.image_span.num_tokens

    def mark_images(self, query: str, num_images: int) -> str:
        """The query with an `<image>` marker for each of its pictures, as it belongs into a history.

        Raises:
            UserError: the query has markers of its own, in another number; or it has no picture and the template takes
                nothing else.
        """
        if self.template.style == "caption" and not num_images:
            raise UserError(f"template {self.template.name!r} answers to pictures only; give an image, or another one")
        query = self.with_usual_markers(query)
        num_markers = query.count(IMAGE_MARKER)
        if num_markers == 0:
            return (IMAGE_MARKER + self.image_joint) * num_images + query
        if num_markers != num_images:
            raise UserError(f"{images_for_markers(num_images, num_markers)}: give one image per marker")
        return query

    def with_usual_markers(self, query: str) -> str:
        """The query with `<image>` for every other marker that the family knows."""
        return query

    def num_markers(self, query: str) -> int:
        """The places that a query gives to pictures."""
        return self.with_usual_markers(query).count(IMAGE_MARKER)

    def question_turns(self, question: str) -> list[str]:
        """The turns, the user's first, in which a question of `mark_images` is asked; the last one is the question."""
        return [question]

    def views(self, image: ImageSource) -> list[Any]:
        """What the towers see of a picture, as `pixels` gives it: the whole, or the whole and parts of it.

        Raises:
            UserError: the picture cannot be read.
        """
        return [self.pixels(image)]

    def image_rows(self, image: ImageSource) -> ImageRows:
        """The feature rows of a picture's views that stand for it. Raises UserError if it cannot be read."""
        return ImageRows(1, np.arange(self.image_span.num_tokens, dtype=np.int32))

    def prompt(
        self,
        query: str,
        *,
        num_images: int = 0,
        history: History | None = None,
        image_lengths: Sequence[int] | None = None,
    ) -> ChatPrompt:
        """Ids of a conversation that ends with the assistant's open turn.

        Args:
            query: the question. Each `<image>` in it is the place of a picture; without any, the pictures that the
                history does not use stand before the question.
            num_images: pictures of the conversation.
            history: earlier turns.
            image_lengths: placeholders of each picture, see `image_rows`; None for those of one view each.

        Raises:
            UserError: pictures and `<image>` markers differ in number.
        """
        history = history or ()
        num_used = sum(earlier.count(IMAGE_MARKER) for earlier, _ in history)
        if num_used > num_images:
            raise UserError(f"{images_for_markers(num_images, num_used)} in the history: give all of them")
        lengths = self._lengths(num_images, image_lengths)
        expand = partial(self.image_span.expand, lengths=iter(lengths))
        messages: list[list[Piece] | str | None] = []
        for earlier, reply in history:
            messages += [*map(expand, self.question_turns(earlier)), reply]
        messages += [*map(expand, self.question_turns(self.mark_images(query, num_images - num_used))), None]
        return self._encode(render(self.template, messages), lengths, prefix_ids=self.tokenizer.prefix_ids)

    def follow_up(
        self, query: str, *, num_images: int = 0, answer_is_closed: bool, image_lengths: Sequence[int] | None = None
    ) -> ChatPrompt:
        """What comes after an answer that is in the KV cache already: the next question and the open answer.

        Args:
            answer_is_closed: the closing mark was generated and its key and value are in the cache.
            image_lengths: as of `prompt`, of the new pictures.
        """
        lengths = self._lengths(num_images, image_lengths)
        expand = partial(self.image_span.expand, lengths=iter(lengths))
        messages = [*map(expand, self.question_turns(self.mark_images(query, num_images))), None]
        closing = self.template.answer_separator
        pieces = [] if answer_is_closed else [Piece(self.template.answer_joint + closing, control=True)]
        for position, message in enumerate(messages):
            pieces += render_turn(self.template, message, is_answer=position % 2 == 1)
        return self._encode(pieces, lengths, continues=closing in self.tokenizer.special_ids)

    def training_sample(self, record: dict | list, *, max_length: int) -> TrainingSample:
        """Ids and labels of a training record, see `build_sample`."""
        return build_sample(
            record,
            tokenizer=self.tokenizer,
            template=self.template,
            image_span=self.image_span,
            max_length=max_length,
        )

    def _lengths(self, num_images: int, image_lengths: Sequence[int] | None) -> list[int]:
        return [self.image_span.num_tokens] * num_images if image_lengths is None else list(image_lengths)

    def _encode(
        self, pieces: list[Piece], lengths: list[int], *, prefix_ids: Sequence[int] = (), continues: bool = False
    ) -> ChatPrompt:
        ids, _ = encode_pieces(pieces, self.tokenizer, continues=continues)
        ids = [*prefix_ids, *ids]
        placeholders = np.flatnonzero(np.array(ids) == self.tokenizer.special_id(self.image_span.placeholder))
        starts = placeholders[np.cumsum([0, *lengths])[:-1]].tolist()
        return ChatPrompt(prompt_text(pieces), ids, starts, lengths)


def images_for_markers(num_images: int, num_markers: int) -> str:
    """How an error says that images and markers differ in number."""
    return f"{counted(num_images, 'image')} for {counted(num_markers, f'{IMAGE_MARKER} marker')}"
