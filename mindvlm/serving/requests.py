"""The requests of `/v1/chat/completions` and `/v1/completions`: their fields, and what is refused."""

import secrets
from dataclasses import dataclass, replace
from typing import Any

from mindvlm.core.config import MAX_NGRAM_SIZE, GenerationConfig
from mindvlm.serving.errors import bad_field, shown
from mindvlm.serving.fields import Fields
from mindvlm.serving.messages import Dialogue, read_messages

MAX_CHOICES, MAX_STOPS, MAX_PROMPTS = 16, 16, 64
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS, MAX_LEGACY_LOGPROBS = 20, 5
GREEDY_BELOW = 1e-4
"""Temperatures below select the most likely token."""

SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What both kinds of requests say about their answers.

    Attributes:
        model: the name that the client asks for.
        options: generation options.
        seed: of the first choice; choice n uses the seed plus n.
        num_choices: answers to a prompt.
        top_logprobs: alternatives to list with each token; None for no log probabilities.
        streams: whether the answer is sent piece by piece.
        include_usage: whether a stream ends with the number of tokens.
    """

    model: str | None
    options: GenerationConfig
    seed: int
    num_choices: int
    top_logprobs: int | None
    streams: bool
    include_usage: bool


def read_chat(body: Any, defaults: GenerationConfig) -> tuple[Wishes, Dialogue]:
    """Returns the wishes and messages of a chat request.

    Args:
        body: the JSON value of the request.
        defaults: the options of the model's YAML, for fields that are absent.

    Raises:
        ApiError: a field has a wrong type or value, or asks for something that this server does not do.
    """
    fields = Fields(body)
    for key in ("tools", "functions", "audio", "prediction", "web_search_options"):
        fields.refuse(key, [], {})
    fields.refuse("tool_choice", "none", "auto")
    fields.refuse("function_call", "none", "auto")
    fields.refuse("modalities", ["text"], [])
    refuse_formats(fields)
    fields.refuse("continue_final_message", False)
    fields.refuse("add_generation_prompt", True)
    longest = fields.whole("max_completion_tokens", 1) or fields.whole("max_tokens", 1)
    top_logprobs = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        top_logprobs = top_logprobs or 0
    elif top_logprobs:
        raise bad_field("top_logprobs", f"{top_logprobs} has no effect without logprobs; set logprobs to true")
    else:
        top_logprobs = None
    return read_wishes(fields, defaults, longest, top_logprobs), read_messages(fields.values.get("messages"))


def read_completion(body: Any, defaults: GenerationConfig) -> tuple[Wishes, list[str]]:
    """Returns the wishes and prompts of a text completion; arguments and errors as in `read_chat`."""
    fields = Fields(body)
    fields.refuse("echo", False)
    fields.refuse("suffix", "")
    best_of = fields.whole("best_of", 1)
    if best_of and best_of > (fields.whole("n", 1, MAX_CHOICES) or 1):
        raise bad_field("best_of", f"{best_of} is not supported by this server beyond n; leave it out")
    prompt = fields.values.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise bad_field("prompt", f"{shown(prompt)}; expected a text or a list of texts")
    if len(prompts) > MAX_PROMPTS:
        raise bad_field("prompt", f"{len(prompts)} texts; the limit is {MAX_PROMPTS}")
    top_logprobs = fields.whole("logprobs", 0, MAX_LEGACY_LOGPROBS)
    return read_wishes(fields, defaults, fields.whole("max_tokens", 1), top_logprobs), prompts


def read_wishes(
    fields: Fields, defaults: GenerationConfig, max_new_tokens: int | None, top_logprobs: int | None
) -> Wishes:
    """Returns the wishes that both kinds of requests have in common."""
    for key in ("frequency_penalty", "presence_penalty"):
        fields.refuse(key, 0, 0.0, remedy="use repetition_penalty")
    for key in ("logit_bias", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        fields.refuse(key, {}, [])
    fields.refuse("min_p", 0, 0.0, remedy="use top_p")
    seed = fields.whole("seed", -SEEDS, SEEDS)
    stream_options = Fields(fields.get("stream_options", dict, "an object") or {}, "stream_options")
    return Wishes(
        model=fields.text("model"),
        options=read_options(fields, defaults, max_new_tokens),
        seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
        num_choices=fields.whole("n", 1, MAX_CHOICES) or 1,
        top_logprobs=top_logprobs,
        streams=fields.flag("stream"),
        include_usage=stream_options.flag("include_usage"),
    )


def read_options(fields: Fields, defaults: GenerationConfig, max_new_tokens: int | None) -> GenerationConfig:
    """Returns the generation options. The length is limited by the context later."""
    changes: dict[str, Any] = {}
    if max_new_tokens is not None:
        changes["max_new_tokens"] = max_new_tokens
    temperature = fields.number("temperature", 0, 2)
    if temperature is not None:
        changes["do_sample"] = temperature >= GREEDY_BELOW
        changes |= {"temperature": temperature} if changes["do_sample"] else {}
    top_k = fields.whole("top_k", -1)
    if top_k is not None:
        changes["top_k"] = max(top_k, 0)
    top_p = fields.number("top_p", 0, 1)
    if top_p is not None:
        # of no mass, the most likely token remains
        changes["top_p"] = max(top_p, 1e-9)
    changes |= {
        key: value
        for key, value in (
            ("repetition_penalty", fields.number("repetition_penalty", 0.01, 100)),
            ("no_repeat_ngram_size", fields.whole("no_repeat_ngram_size", 0, MAX_NGRAM_SIZE)),
        )
        if value is not None
    }
    return replace(defaults, **changes, stop_strings=[*defaults.stop_strings, *read_stops(fields)])


def read_stops(fields: Fields) -> list[str]:
    """Returns the texts that end an answer; empty ones are ignored."""
    stops = fields.values.get("stop")
    stops = [stops] if isinstance(stops, str) else [] if stops is None else stops
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise bad_field("stop", f"{shown(stops)}; expected a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise bad_field("stop", f"{len(stops)} texts; the limit is {MAX_STOPS}")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_LENGTH:
        raise bad_field("stop", f"a text of {longest} characters; the limit is {MAX_STOP_LENGTH}")
    return [one for one in stops if one]


def refuse_formats(fields: Fields) -> None:
    """Raises ApiError for a format of the answer other than text."""
    value = fields.get("response_format", dict, "an object")
    if value and value.get("type") != "text":
        raise bad_field("response_format", f"{shown(value)} is not supported by this server; ask for it in the prompt")
