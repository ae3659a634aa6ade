"""A conversation that never computes an earlier turn or picture again."""

from mindspore import Tensor, ops

from mindvlm.api import VisionLanguageModel, as_list
from mindvlm.generation.answer import Answer, AnswerStream
from mindvlm.processing.images.image_span import ImageRows
from mindvlm.processing.text.tokenizer import Tokenizer


class Conversation:
    """Turns with one model.

    Keys and values of all earlier turns stay in the model's cache and only what is new is prefilled. The cache is
    built again when something else used the model in between, or when the dynamic NTK factor of the longer prompt is
    another one (its keys were rotated with the old base).
    """

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and pictures."""
        self.turns: list[tuple[str, str]] = []
        self.features: Tensor | None = None
        self.pictures: list[ImageRows] = []
        self.ids: list[int] = []
        self.answer_is_closed = False
        self.open_answer: AnswerStream | None = None

    def ask(self, query: str, images=None, *, stream: bool = False, **generation) -> Answer | AnswerStream:
        """The next turn; `images` are those that are new in it. Other arguments and errors as in
        `VisionLanguageModel.chat`; after an error the conversation is as it was. An earlier answer that was not read to
        its end stays as far as it came."""
        if self.open_answer:
            self.open_answer.close()
        model, images = self.model, as_list(images)
        model.generation_config(generation)
        model.engine.reset_clock()
        new_features, new_pictures = model.encode_images(images), model.image_rows(images)
        asked = model.processor.mark_images(query, len(images))
        prefix, addition = self.continuation(query, new_pictures)
        pictures = [*self.pictures, *new_pictures]
        if prefix is None:
            prefix = []
            addition = model.prompt(query, pictures, self.turns).input_ids
            model.engine.check_length(len(addition))
            model.engine.reset(1)
            logits = model.engine.append([addition], join(self.features, new_features), model.order(pictures))
        else:
            logits = model.engine.append([addition], new_features, model.order(new_pictures))
        self.features, self.pictures = join(self.features, new_features), pictures
        prompt = prefix + addition
        model.engine.owner = self
        answers = model.start_answers([prompt], logits, generation, turns=[[*self.turns, (asked, "")]])

        def finish() -> Answer:
            answer = answers.answer(0)
            if self.open_answer is result:
                self.take_over(prompt, answer)
            return answer

        result = self.open_answer = AnswerStream(answers.pieces(0), finish)
        return result if stream else result.answer

    def continuation(self, query: str, pictures: list[ImageRows]) -> tuple[list[int] | None, list[int]]:
        """Ids that are in the cache and ids to add; (None, []) when the cache cannot be continued."""
        engine = self.model.engine
        if not self.turns or engine.owner is not self:
            return None, []
        prompt = self.model.processor.follow_up(
            query,
            num_images=len(pictures),
            answer_is_closed=self.answer_is_closed,
            image_lengths=[len(picture.rows) for picture in pictures],
        )
        if engine.alpha_for(len(self.ids) + len(prompt.input_ids)) != engine.alpha:
            return None, []
        num_cached = int(engine.lengths[0])
        return self.ids[:num_cached], self.ids[num_cached:] + prompt.input_ids

    def take_over(self, prompt: list[int], answer: Answer) -> None:
        """Makes an answer, whole or interrupted, part of the conversation."""
        self.open_answer = None
        self.turns = answer.history
        processor, engine = self.model.processor, self.model.engine
        closing_mark = processor.tokenizer.special_ids.get(processor.template.answer_separator)
        ids, rest = answer.ids, []
        self.answer_is_closed = answer.stop_reason == "stop_token" and ids[-1] == closing_mark
        if answer.stop_reason == "stop_token" and not self.answer_is_closed:
            ids = ids[:-1]
        if answer.stop_reason == "stop_string":
            ids, rest = ids_of_text(answer.generated, ids, processor.tokenizer)
        # a picture's placeholder that the model said itself would ask for a picture when it is prefilled
        while ids and ids[-1] == engine.placeholder_id:
            ids = ids[:-1]
        if engine.owner is self:
            engine.truncate(len(prompt) + len(ids))
        self.ids = prompt + ids + rest


def ids_of_text(text: str, ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The first of the generated ids, as many as `text` begins with, and the ids of its rest."""
    encoded = text.encode()
    for count in range(len(ids), 0, -1):
        head = tokenizer.decode_bytes(ids[:count], skip_special=True)
        rest = encoded[len(head) :].decode(errors="ignore")
        if encoded == head + rest.encode():
            return ids[:count], tokenizer.encode(rest)
    return [], tokenizer.encode(text)


def join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Image features of both, in order."""
    if first is None or second is None:
        return second if first is None else first
    return ops.concat((first, second), 0)
