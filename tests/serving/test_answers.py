"""What an answer reports: the pieces of its text with their tokens, and its figures."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.answer import AnswerText
from mindvlm.serving.answers import EventStream
from mindvlm.serving.errors import ApiError
from mindvlm.serving.jobs import Event, Finish, Job
from mindvlm.serving.prompts import Prompt
from mindvlm.serving.replies import ChatReply, closing_figures
from tests.processing.text.small_vocabulary import small_tokenizer

TOKENIZER = small_tokenizer()


def reported(text: str, *, stop: str, every: int = 1, streams: bool = True) -> list[tuple[str, str]]:
    """Returns the text and the tokens of each event of an answer that is generated letter by letter.

    Args:
        every: number of letters between two events.
    """
    answer = AnswerText((), [stop], TOKENIZER.text_decoder())
    job = Job(
        prompt=Prompt(ids=[1]),
        options=GenerationConfig(),
        seed=0,
        text=answer,
        receive=lambda event: None,
        streams=streams,
        top_logprobs=0,
        asked_at=0,
        expires=0,
    )
    job.slot = SimpleNamespace(new_ids=[], stop_reason=None, request=SimpleNamespace(ids=[1]))
    found = []
    for number, token in enumerate(text.encode(), 1):
        job.slot.new_ids.append(token)
        job.slot.stop_reason = answer.reason_after(token)
        if event := job.take_token(np.zeros(len(TOKENIZER), np.float32), sends_piece=number % every == 0):
            found.append((event.text, TOKENIZER.decode([token.id for token in event.tokens])))
        if job.slot.stop_reason:
            break
    return found


def test_tokens_come_with_their_text_and_never_with_a_stop_text():
    pieces = reported(" fo EX END", stop="END")
    # what may begin a stop text, or is white space at the end, waits with its text
    assert pieces == [("f", " f"), ("o", "o"), (" EX", " EX"), ("", " ")]
    # the first piece does not wait
    assert reported("foo END", stop="END", every=5) == [("f", "f"), ("oo", "oo"), ("", " ")]
    assert reported(" fo EX END", stop="END", streams=False) == [("fo EX", " fo EX ")]


def sent(*events: Event, num_jobs: int = 1) -> list[list[str]]:
    """Returns the data of the lines of each message of a stream."""

    async def collect() -> list[bytes]:
        first, *rest = (event and (0, event) for event in events)
        news = iter(rest)

        async def following():
            return next(news)

        answers = SimpleNamespace(jobs=[None] * num_jobs, next=following)
        stream = EventStream(answers, first, ChatReply("m", TOKENIZER, num_jobs), include_usage=True)
        return [lines async for lines in stream.lines()]

    return [message.decode().split("\n\n")[:-1] for message in asyncio.run(collect())]


def test_what_an_event_tells_is_one_message():
    finish = Finish(
        stop_reason="stop_token",
        num_prompt_tokens=5,
        num_reused=0,
        num_new_tokens=2,
        prefill_seconds=1,
        decode_seconds=1,
    )
    waited, piece, ended = sent(None, Event(text="a"), Event(text="b", finish=finish))
    assert waited == [": waiting"]
    contents = [json.loads(line[6:])["choices"][0]["delta"] for line in piece]
    assert contents == [{"role": "assistant", "content": ""}, {"content": "a"}]
    *chunks, end = ended
    text, last, usage = (json.loads(chunk[6:]) for chunk in chunks)
    assert text["choices"][0]["delta"] == {"content": "b"} and last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 2 and end == "data: [DONE]"
    _, (failed, end) = sent(Event(text="a"), Event(error=ApiError(500, "broken")), num_jobs=2)
    assert json.loads(failed[6:])["error"]["message"] == "broken" and end == "data: [DONE]"


def test_an_error_while_a_stream_is_sent_is_its_last_event():
    messages = []

    async def send_all() -> None:
        async def send(message):
            messages.append(message)

        async def following():
            raise ValueError("broken")

        answers = SimpleNamespace(jobs=[None], next=following)
        stream = EventStream(answers, (0, Event(text="a")), ChatReply("m", TOKENIZER, 1), include_usage=False)
        await stream.send_all(send)

    asyncio.run(send_all())
    failed, end = messages[-1]["body"].decode().split("\n\n")[:-1]
    assert json.loads(failed[6:])["error"]["code"] == "internal_error" and end == "data: [DONE]"
    assert [message["more_body"] for message in messages] == [True, False]


@pytest.mark.parametrize("num_choices", [1, 2])
def test_figures_of_several_prompts(num_choices):
    lengths = ((5, 0, 0.5), (100, 64, 0.25))
    finishes = [
        Finish(
            stop_reason="stop_token",
            num_prompt_tokens=length,
            num_reused=reused,
            num_new_tokens=3,
            prefill_seconds=seconds,
            decode_seconds=1,
        )
        for length, reused, seconds in lengths
        for _ in range(num_choices)
    ]
    found = closing_figures(finishes, num_choices)
    assert found["usage"] == {
        "prompt_tokens": 105,
        "completion_tokens": 6 * num_choices,
        "total_tokens": 105 + 6 * num_choices,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    timings = found["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["prompt_ms"]) == (64, 41, 500)
