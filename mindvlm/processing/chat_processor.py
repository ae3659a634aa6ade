"""Conversion of questions and earlier turns to ids, shared by the processors of all families."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, ImageSource
from mindvlm.processing.images.picture import Picture, ShownView
from mindvlm.processing.samples.chat_samples import TrainingSample, build_sample
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render, render_turn
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.processing.text.tokenizer import Tokenizer

History = Sequence[tuple[str, str]]
"""Earlier turns as (query, reply); the query contains its image markers, see `ChatProcessor.mark_images`."""


@dataclass(frozen=True)
class ChatPrompt:
    """Token ids of a prompt.

    Attributes:
        text: the prompt with all placeholders, without the prefix tokens of the tokenizer.
        placeholder_starts: index of the first placeholder of each image in `input_ids`.
        image_lengths: number of consecutive placeholders of each image.
        num_reply_tokens: number of ids at the end that are a given reply.
    """

    text: str
    input_ids: list[int]
    placeholder_starts: list[int]
    image_lengths: list[int]
    num_reply_tokens: int = field(default=0, kw_only=True)


class ChatProcessor:
    """Base class of a family's processor. A subclass defines `picture`, or `pixels`, the only view of a picture.

    Control tokens are disarmed in the text of users and of the model, and armed in the template.

    Args:
        tokenizer: contains the tokens of the image span.
        image_joint: text between an image and a question without `<image>` marker.

    Attributes:
        cuts_samples: whether `training_sample` cuts long samples itself.
        templates: the family's templates by name.
        max_pixels: limit of width x height of a picture.

    Raises:
        UserError: the vocabulary lacks a required token.
    """

    cuts_samples: bool = False
    templates: Mapping[str, ChatTemplate] = {}
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, image_span: ImageSpan, *, image_joint: str):
        self.tokenizer, self.template, self.image_span = tokenizer, template, image_span
        self.image_joint = image_joint
        for token in (*image_span.tokens, tokenizer.end_token):
            tokenizer.special_id(token)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those of `stop_strings` that are tokens."""
        special_ids = self.tokenizer.special_ids
        return tuple(special_ids[mark] for mark in self.stop_strings if mark in special_ids)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer: the closing mark of the template and the end of text.

        They stop as ordinary letters too, because a model trained without the token spells it.
        """
        return tuple(dict.fromkeys((self.template.answer_separator, self.tokenizer.end_token)))

    @property
    def shows_system(self) -> bool:
        """Whether training samples have a place for a record's system message."""
        return self.template.style not in ("caption", "plain") and not self.cuts_samples

    @property
    def picture_lengths(self) -> tuple[int, int]:
        """Number of placeholders of a small and of a large picture; pictures with margins may have fewer."""
        return self.image_span.num_tokens, self.image_span.num_tokens

    def mark_images(self, query: str, num_images: int) -> str:
        """Returns the query with one `<image>` marker per picture, as required in a history.

        Raises:
            UserError: the query has another number of markers, or a caption template has no picture.
        """
        if self.template.style == "caption" and not num_images:
            raise UserError(
                f"template {self.template.name!r} needs a picture; give an image, or choose another template"
            )
        query = self.with_usual_markers(query)
        num_markers = query.count(IMAGE_MARKER)
        if num_markers == 0:
            return (IMAGE_MARKER + self.image_joint) * num_images + query
        if num_markers != num_images:
            raise UserError(f"{images_for_markers(num_images, num_markers)}: give one image per marker")
        return query

    def with_usual_markers(self, query: str) -> str:
        """Returns the query with the family's other image markers replaced by `<image>`."""
        return query

    def num_markers(self, query: str) -> int:
        """Returns the number of image markers in a query."""
        return self.with_usual_markers(query).count(IMAGE_MARKER)

    def question_turns(self, question: str) -> list[str]:
        """Returns the turns of a question from `mark_images`, starting with the user; the last one is the question."""
        return [question]

    def picture(self, image: ImageSource) -> Picture:
        """Reads a picture and cuts it into the views for the towers.

        Raises:
            UserError: the picture cannot be read.
        """
        return self.whole_picture(self.pixels(image))

    def shown_views(self, image: ImageSource) -> list[ShownView]:
        """Returns the views of a picture for people to look at. Raises UserError if the model sees pictures whole."""
        raise UserError("this model sees pictures whole and cuts no tiles; choose a model that does")

    def whole_picture(self, pixels) -> Picture:
        """Returns a picture with one view, the result of `pixels`."""
        return Picture((pixels,), np.arange(self.image_span.num_tokens, dtype=np.int32))

    def prompt(
        self,
        query: str,
        *,
        num_images: int = 0,
        history: History | None = None,
        image_lengths: Sequence[int] | None = None,
        reply: str | None = None,
        system: str | None = None,
    ) -> ChatPrompt:
        """Returns the prompt of a conversation, which ends with the assistant's open turn.

        Args:
            query: the question. `<image>` marks the place of a picture; without markers, the pictures that the history
                does not use precede the question.
            num_images: number of pictures in the conversation.
            history: earlier turns.
            image_lengths: number of placeholders of each picture, see `Picture.layout`; None for one view each.
            reply: the reply to the question as in training, without its closing mark, in place of the open turn.
            system: replaces the system message of the template.

        Raises:
            UserError: the numbers of pictures and `<image>` markers differ, or the template has no system message.
        """
        template = self.template
        if system is not None:
            if not template.has_system:
                raise UserError(f"template {template.name!r} has no place for a system message; leave it out")
            template = replace(template, system=system)
        history = history or ()
        num_used = sum(earlier.count(IMAGE_MARKER) for earlier, _ in history)
        if num_used > num_images:
            raise UserError(f"{images_for_markers(num_images, num_used)} in the history: give all of them")
        lengths = self._lengths(num_images, image_lengths)
        expand = partial(self.image_span.expand, lengths=iter(lengths))
        messages: list[list[Piece] | str | None] = []
        for earlier, answer in history:
            messages += [*map(expand, self.question_turns(earlier)), answer]
        messages += map(expand, self.question_turns(self.mark_images(query, num_images - num_used)))
        pieces = render(template, [*messages, reply])
        before = len(pieces) if reply is None else len(render(template, messages))
        return self._encode(pieces, lengths, prefix_ids=self.tokenizer.prefix_ids, reply_from=before)

    def follow_up(
        self, query: str, *, num_images: int = 0, answer_is_closed: bool, image_lengths: Sequence[int] | None = None
    ) -> ChatPrompt:
        """Returns the prompt that continues after an answer in the KV cache: the next question and the open answer.

        Args:
            answer_is_closed: whether the generated answer ends with its closing mark.
            image_lengths: as in `prompt`, for the new pictures.
        """
        lengths = self._lengths(num_images, image_lengths)
        expand = partial(self.image_span.expand, lengths=iter(lengths))
        messages = [*map(expand, self.question_turns(self.mark_images(query, num_images))), None]
        closing = self.template.answer_separator
        pieces = [] if answer_is_closed else [Piece(self.template.answer_joint + closing, control=True)]
        for position, message in enumerate(messages):
            pieces += render_turn(self.template, message, is_answer=position % 2 == 1)
        return self._encode(pieces, lengths, continues=closing in self.tokenizer.special_ids)

    @property
    def rows_per_view(self) -> int:
        """Number of feature rows of a view, see `Picture.layout`."""
        return self.image_span.num_tokens

    @property
    def lengths_differ(self) -> bool:
        """Whether pictures have other numbers of placeholders than the image span."""
        return set(self.picture_lengths) != {self.image_span.num_tokens}

    def training_sample(
        self, record: dict | list, *, max_length: int, image_lengths: Sequence[int] | None = None
    ) -> TrainingSample:
        """Returns the ids and labels of a training record, see `build_sample`."""
        return build_sample(
            record,
            tokenizer=self.tokenizer,
            template=self.template,
            image_span=self.image_span,
            max_length=max_length,
            image_lengths=image_lengths,
        )

    def _lengths(self, num_images: int, image_lengths: Sequence[int] | None) -> list[int]:
        return [self.image_span.num_tokens] * num_images if image_lengths is None else list(image_lengths)

    def _encode(
        self,
        pieces: list[Piece],
        lengths: list[int],
        *,
        prefix_ids: Sequence[int] = (),
        continues: bool = False,
        reply_from: int | None = None,
    ) -> ChatPrompt:
        ids, owners = encode_pieces(pieces, self.tokenizer, continues=continues)
        num_reply_tokens = 0
        if reply_from is not None and reply_from < len(pieces):
            # the text of the reply is the only one that is not the template's; its closing mark follows
            end = next(number for number in range(reply_from, len(pieces)) if not pieces[number].control) + 1
            ids, pieces = ids[: sum(owner < end for owner in owners)], pieces[:end]
            num_reply_tokens = sum(owner >= reply_from and pieces[owner].learned for owner in owners[: len(ids)])
        ids = [*prefix_ids, *ids]
        placeholders = np.flatnonzero(np.array(ids) == self.tokenizer.special_id(self.image_span.placeholder))
        starts = placeholders[np.cumsum([0, *lengths])[:-1]].tolist()
        return ChatPrompt(prompt_text(pieces), ids, starts, lengths, num_reply_tokens=num_reply_tokens)


def images_for_markers(num_images: int, num_markers: int) -> str:
    """Returns the beginning of the error for different numbers of images and markers."""
    return f"{counted(num_images, 'image')} for {counted(num_markers, f'{IMAGE_MARKER} marker')}"
