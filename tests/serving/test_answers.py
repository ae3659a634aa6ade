"""What an answer reports: the pieces of its text with their tokens, and its figures."""

from types import SimpleNamespace

import numpy as np
import pytest

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.answer import AnswerText
from mindvlm.serving import jobs
from mindvlm.serving.jobs import Finish, Job
from mindvlm.serving.prompts import Prompt
from mindvlm.serving.replies import closing_figures
from tests.processing.text.small_vocabulary import small_tokenizer

TOKENIZER = small_tokenizer()


def reported(monkeypatch, text: str, *, stop: str, every: int = 1, streams: bool = True) -> list[tuple[str, str]]:
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
        expires=0,
    )
    job.slot = SimpleNamespace(new_ids=[], stop_reason=None, request=SimpleNamespace(ids=[1]))
    found = []
    for number, token in enumerate(text.encode(), 1):
        monkeypatch.setattr(jobs, "PIECE_SECONDS", 0 if number % every == 0 else np.inf)
        job.slot.new_ids.append(token)
        job.slot.stop_reason = answer.reason_after(token)
        if event := job.take_token(np.zeros(len(TOKENIZER), np.float32)):
            found.append((event.text, TOKENIZER.decode([token.id for token in event.tokens])))
        if job.slot.stop_reason:
            break
    return found


def test_tokens_come_with_their_text_and_never_with_a_stop_text(monkeypatch):
    pieces = reported(monkeypatch, " fo EX END", stop="END")
    # what may begin a stop text, or is white space at the end, waits with its text
    assert pieces == [("f", " f"), ("o", "o"), (" EX", " EX"), ("", " ")]
    assert reported(monkeypatch, "foo END", stop="END", every=5) == [("foo", "foo"), ("", " ")]
    assert reported(monkeypatch, " fo EX END", stop="END", streams=False) == [("fo EX", " fo EX ")]


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
