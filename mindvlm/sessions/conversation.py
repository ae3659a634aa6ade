"""A conversation of several turns that computes each token once."""

from collections.abc import Sequence
from functools import partial

from mindvlm.generation.answer import Answer, AnswerStream, Turns
from mindvlm.generation.images import ImageFeatures
from mindvlm.generation.request import Slot
from mindvlm.processing.chat_processor import ChatPrompt
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.sessions.vision_language_model import VisionLanguageModel


class Conversation:
    """A conversation with a model that prefills only new tokens.

    The keys and values of earlier turns stay in the engine's cache. The whole conversation is prefilled again if
    another request used the model in between, if the longer prompt has another dynamic NTK factor, or if the feature
    rows of its pictures depend on the text.
    """

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and pictures."""
        self.turns: Turns = []
        self.pictures: list[Picture] = []
        self.features = ImageFeatures()
        self.ids: list[int] = []
        self.slot: Slot | None = None
        self.answer_is_closed = False
        self.open_answer: AnswerStream | None = None

    def ask(self, query: str, images=None, *, stream: bool = False, **generation) -> Answer | AnswerStream:
        """Asks the next question; `images` are the new pictures.

        Other arguments and errors are those of `VisionLanguageModel.chat`. An error leaves the conversation unchanged.
        An earlier answer that was not read to its end is kept as far as it was generated.
        """
        if self.open_answer:
            self.open_answer.close()
        model, engine = self.model, self.model.engine
        options, pictures = model.options(generation), model.pictures(images)
        engine.runner.reset_clock()
        asked = model.processor.mark_images(query, len(pictures))
        seen = [*self.pictures, *pictures]
        chosen_anew = bool(seen) and model.model.rows_depend_on_text
        kept = ImageFeatures() if chosen_anew else self.features
        slot = None if self.slot is None or self.slot.is_released or chosen_anew else self.slot
        if slot:
            follow_up = partial(self.follow_up, query, len(pictures))
            ids, new_features = model.prepared(follow_up, pictures, prefix=self.ids)
        if not slot or engine.alpha_for(len(ids)) != slot.alpha:
            whole = partial(self.whole, query, kept.counts)
            ids, new_features = model.prepared(whole, seen if chosen_anew else pictures)
            engine.resize(1)
            slot = None
        earlier, features = (self.features, self.pictures), kept.followed_by(new_features)

        def take_over(answer: Answer) -> None:
            if self.open_answer is not result:
                return
            if result.slot.error:
                (self.features, self.pictures), self.open_answer = earlier, None
                engine.release(result.slot)
            else:
                self.take_over(ids, answer)

        result = model.start(ids, features, options, earlier=self.turns, asked=asked, slot=slot, on_close=take_over)
        self.features, self.pictures, self.slot, self.open_answer = features, seen, result.slot, result
        return result if stream else result.answer

    def follow_up(self, query: str, num_images: int, counts: Sequence[int]) -> ChatPrompt:
        """Returns the prompt after the earlier turns; `counts` are the placeholders of the new pictures."""
        return self.model.processor.follow_up(
            query, num_images=num_images, answer_is_closed=self.answer_is_closed, image_lengths=counts
        )

    def whole(self, query: str, earlier_counts: Sequence[int], counts: Sequence[int]) -> ChatPrompt:
        """Returns the prompt of the whole conversation.

        Args:
            query: the question.
            earlier_counts: placeholders of the first pictures.
            counts: placeholders of the other ones.
        """
        counts = [*earlier_counts, *counts]
        return self.model.processor.prompt(query, num_images=len(counts), history=self.turns, image_lengths=counts)

    def take_over(self, prompt: list[int], answer: Answer) -> None:
        """Adds a complete or interrupted answer to the conversation."""
        self.open_answer = None
        self.turns = answer.history
        processor = self.model.processor
        closing_mark = processor.tokenizer.special_ids.get(processor.template.answer_separator)
        ids, rest = answer.ids, []
        self.answer_is_closed = answer.stop_reason == "stop_token" and ids[-1] == closing_mark
        if answer.stop_reason == "stop_token" and not self.answer_is_closed:
            ids = ids[:-1]
        if answer.stop_reason == "stop_string":
            ids, rest = ids_of_text(answer.generated, ids, processor.tokenizer)
        # a generated placeholder has no picture and cannot be prefilled
        while ids and ids[-1] == self.model.engine.placeholder_id:
            ids = ids[:-1]
        self.ids = prompt + ids + rest


def ids_of_text(text: str, ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the longest prefix of the generated ids that `text` begins with, and the ids of the remaining text."""
    encoded = text.encode()
    for count in range(len(ids), 0, -1):
        head = tokenizer.decode_bytes(ids[:count], skip_special=True)
        rest = encoded[len(head) :].decode(errors="ignore")
        if encoded == head + rest.encode():
            return ids[:count], tokenizer.encode(rest)
    return [], tokenizer.encode(text)
