"""The JSON objects of answers: whole ones and chunks of a stream, for chats and for text completions."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.serving.jobs import Event, Finish, ScoredToken

FINISH_REASONS = {"stop_token": "stop", "stop_string": "stop"}
"""All other answers were cut: "length"."""


class ChatReply:
    """Builds the objects of one chat answer; their id and time are the same.

    Args:
        model: name of the model.
        tokenizer: gives tokens as text.
        num_choices: answers to a prompt.
    """

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, model: str, tokenizer: Tokenizer, num_choices: int):
        self.head = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self.tokenizer, self.num_choices = tokenizer, num_choices
        self.texts: dict[int, int] = {}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Returns the object of an answer with one final event for each choice."""
        choices = [self.choice(index, event) for index, event in enumerate(events)]
        return self.object(self.kind, choices) | closing_figures([event.finish for event in events], self.num_choices)

    def choice(self, index: int, event: Event) -> dict[str, Any]:
        message = {"role": "assistant", "content": event.text, "refusal": None}
        return self.framed(index, event) | {"message": message}

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        """Returns the chunks that begin a choice."""
        return [self.chunk(index, Event(), {"delta": {"role": "assistant", "content": ""}})]

    def text_chunk(self, index: int, event: Event) -> dict[str, Any]:
        """Returns the chunk with a piece of the text."""
        piece = Event(text=event.text, tokens=event.tokens)
        return self.chunk(index, piece, {"delta": {"content": event.text}})

    def last_chunk(self, index: int, event: Event) -> dict[str, Any]:
        """Returns the chunk that ends a choice."""
        return self.chunk(index, Event(finish=event.finish), {"delta": {}})

    def chunk(self, index: int, event: Event, content: dict[str, Any]) -> dict[str, Any]:
        return self.object(self.chunk_kind, [self.framed(index, event) | content])

    def usage_chunk(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """Returns the chunk with the number of tokens."""
        return self.object(self.chunk_kind, []) | closing_figures(finishes, self.num_choices)

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head | {"object": kind, "choices": choices}

    def framed(self, index: int, event: Event) -> dict[str, Any]:
        """Returns the parts of a choice besides its text."""
        finish = event.finish
        return {
            "index": index,
            "finish_reason": None if finish is None else FINISH_REASONS.get(finish.stop_reason, "length"),
            "stop_reason": None if finish is None else finish.stop_reason,
            "logprobs": self.logprobs(index, event.tokens) if event.tokens else None,
        }

    def logprobs(self, index: int, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Returns the log probabilities of the tokens of a piece."""
        content = [
            self.token(token.id, token.logprob) | {"top_logprobs": [self.token(*one) for one in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def token(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self.tokenizer.decode_bytes([token_id])
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}


class TextReply(ChatReply):
    """Builds the objects of one text completion."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl-"

    def choice(self, index: int, event: Event) -> dict[str, Any]:
        return self.framed(index, event) | {"text": event.text}

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        return []

    def text_chunk(self, index: int, event: Event) -> dict[str, Any]:
        return self.chunk(index, Event(text=event.text, tokens=event.tokens), {"text": event.text})

    def last_chunk(self, index: int, event: Event) -> dict[str, Any]:
        return self.chunk(index, Event(finish=event.finish), {"text": ""})

    def logprobs(self, index: int, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        texts = [self.token(one.id, one.logprob)["token"] for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.texts.get(index, 0))
            self.texts[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self.token(*top)["token"]: top[1] for top in one.top} for one in tokens],
            "text_offset": offsets,
        }


def closing_figures(finishes: Sequence[Finish], num_choices: int) -> dict[str, Any]:
    """Returns the number of tokens, and times under the names of llama-server.

    A prompt counts once for all its choices. Of several prompts or answers, the longest time is returned.
    """
    prompts = finishes[::num_choices]
    num_prompt = sum(finish.num_prompt_tokens for finish in prompts)
    num_reused = sum(finish.num_reused for finish in prompts)
    num_new = sum(finish.num_new_tokens for finish in finishes)
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_reused},
    }
    prefill_seconds = max(finish.prefill_seconds for finish in prompts)
    decode_seconds = max(finish.decode_seconds for finish in finishes)
    timings = {
        "cache_n": num_reused,
        **speed("prompt", num_prompt - num_reused, prefill_seconds),
        **speed("predicted", num_new, decode_seconds),
    }
    return {"usage": usage, "timings": timings}


def speed(stage: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{stage}_n": count,
        f"{stage}_ms": seconds * 1e3,
        f"{stage}_per_token_ms": seconds * 1e3 / max(count, 1),
        f"{stage}_per_second": count / max(seconds, 1e-9),
    }
