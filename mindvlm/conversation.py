"""A conversation that never computes an earlier turn or picture again."""

from mindspore import Tensor, ops

from mindvlm.api import VisionLanguageModel, as_list
from mindvlm.generation.answer import Answer, AnswerStream


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
        self.ids: list[int] = []
        self.answer_is_closed = False

    def ask(self, query: str, images=None, *, stream: bool = False, **generation) -> Answer | AnswerStream:
        """The next turn; `images` are those that are new in it. Other arguments and errors as in
        `VisionLanguageModel.chat`; after an error the conversation is as it was."""
        model, images = self.model, as_list(images)
        model.engine.reset_clock()
        new_features = model.encode_images(images)
        asked = model.processor.mark_images(query, len(images))
        prefix, addition = self.continuation(query, len(images))
        if prefix is None:
            features = join(self.features, new_features)
            num_images = 0 if features is None else features.shape[0]
            prefix = []
            addition = model.processor.prompt(query, num_images=num_images, history=self.turns).input_ids
            model.engine.check_length(len(addition))
            model.engine.reset(1)
            logits = model.engine.append([addition], features)
        else:
            logits = model.engine.append([addition], new_features)
        self.features = join(self.features, new_features)
        prompt = prefix + addition
        model.engine.owner = self
        answers = model.start_answers([prompt], logits, generation, turns=[[*self.turns, (asked, "")]])

        def finish() -> Answer:
            answer = answers.answer(0)
            self.take_over(prompt, answer)
            return answer

        result = AnswerStream(answers.pieces(0), finish)
        return result if stream else result.answer

    def continuation(self, query: str, num_images: int) -> tuple[list[int] | None, list[int]]:
        """Ids that are in the cache and ids to add; (None, []) when the cache cannot be continued."""
        engine = self.model.engine
        if not self.turns or engine.owner is not self:
            return None, []
        prompt = self.model.processor.follow_up(query, num_images=num_images, answer_is_closed=self.answer_is_closed)
        if engine.alpha_for(len(self.ids) + len(prompt.input_ids)) != engine.alpha:
            return None, []
        num_cached = int(engine.lengths[0])
        return self.ids[:num_cached], self.ids[num_cached:] + prompt.input_ids

    def take_over(self, prompt: list[int], answer: Answer) -> None:
        """Makes an answer, whole or interrupted, part of the conversation."""
        self.turns = answer.history
        stop_ids = self.model.processor.stop_ids
        ids = answer.ids
        self.answer_is_closed = bool(ids) and ids[-1] == stop_ids[0] and answer.stop_reason == "stop_token"
        if answer.stop_reason == "stop_token" and not self.answer_is_closed:
            ids = ids[:-1]
        self.ids = prompt + ids


def join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Image features of both, in order."""
    if first is None or second is None:
        return second if first is None else first
    return ops.concat((first, second), 0)
