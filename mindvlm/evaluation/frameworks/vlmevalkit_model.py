"""A model of VLMEvalKit. This is the only module that imports VLMEvalKit, which switches TLS verification off."""

from collections.abc import Sequence
from typing import Any

from vlmeval.inference import FAIL_MSG
from vlmeval.vlm.base import BaseModel

from mindvlm.core.errors import UserError
from mindvlm.evaluation.frameworks.messages import read_messages
from mindvlm.sessions.vision_language_model import VisionLanguageModel


class VlmEvalKitModel(BaseModel):
    """A model with pictures between texts and earlier turns. Decoding is greedy.

    Args:
        model: answers the questions, one at a time, because VLMEvalKit asks so.
        max_new_tokens: of an answer; None for that of the model's YAML.
    """

    INTERLEAVE = True

    def __init__(self, model: VisionLanguageModel, max_new_tokens: int | None = None):
        super().__init__()
        self.model = model
        self.options: dict[str, Any] = {"do_sample": False}
        if max_new_tokens is not None:
            self.options["max_new_tokens"] = max_new_tokens

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """Answers a question; if that is impossible, returns VLMEvalKit's mark of failures with the cause."""
        parts = [(part.get("role", "user"), [(part["type"], part["value"])]) for part in message]
        return self.answer(parts)

    def chat_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """Answers the last question of a conversation, as `generate_inner`."""
        turns = [(turn["role"], [(part["type"], part["value"]) for part in turn["content"]]) for turn in message]
        return self.answer(turns)

    def answer(self, messages: Sequence[tuple[str, list[tuple[str, Any]]]]) -> str:
        """Answers the last question of messages as in `read_messages`."""
        try:
            query, pictures, history = read_messages(messages, self.model.processor)
            return str(self.model.chat(query, pictures, history, **self.options))
        except UserError as error:
            return f"{FAIL_MSG} {error}"
