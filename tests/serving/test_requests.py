"""The fields of requests: what acts, what is refused in words, and that no value makes the server fail."""

import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindvlm.api import load
from mindvlm.core.config import GenerationConfig
from mindvlm.serving.errors import ApiError
from mindvlm.serving.fields import parse_json
from mindvlm.serving.messages import PictureUrl, read_messages
from mindvlm.serving.prompts import chat_prompt
from mindvlm.serving.requests import read_chat, read_completion
from tests.serving.running import running, shown
from tests.tiny_vary import write_tiny_opt

DEFAULTS = GenerationConfig(max_new_tokens=9, stop_strings=["###"])


def options_of(**fields) -> GenerationConfig:
    return read_chat({"messages": shown(0), **fields}, DEFAULTS)[0].options


def test_fields_that_act():
    assert options_of() == DEFAULTS
    assert options_of(max_tokens=5).max_new_tokens == 5
    assert options_of(max_tokens=5, max_completion_tokens=7.0).max_new_tokens == 7
    sampled = options_of(temperature=0.5, top_p=0.9, top_k=-1)
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.5, 0.9, 0)
    assert not options_of(temperature=0).do_sample
    assert options_of(top_p=0).top_p > 0
    assert options_of(stop="a").stop_strings == ["###", "a"]
    assert options_of(stop="a" * 256).stop_strings[1] == "a" * 256
    assert options_of(stop=["a", "", "b"]).stop_strings == ["###", "a", "b"]
    rules = options_of(repetition_penalty=1.2, no_repeat_ngram_size=3)
    assert (rules.repetition_penalty, rules.no_repeat_ngram_size) == (1.2, 3)
    wishes, _ = read_chat({"messages": shown(0), "seed": -1, "n": 3, "logprobs": True, "top_logprobs": 2}, DEFAULTS)
    assert (wishes.seed, wishes.num_choices, wishes.top_logprobs) == (2**63 - 1, 3, 2)
    wishes, _ = read_chat({"messages": shown(0), "stream": True, "stream_options": {"include_usage": True}}, DEFAULTS)
    assert wishes.streams and wishes.include_usage and wishes.top_logprobs is None


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {key: None}
            for key in ("temperature", "stop", "seed", "n", "logprobs", "stream_options", "max_tokens", "tools")
        ),
        *(
            {"frequency_penalty": 0},
            {"presence_penalty": 0.0},
            {"logit_bias": {}},
            {"tools": []},
            {"tool_choice": "none"},
        ),
        *({"response_format": {"type": "text"}}, {"modalities": ["text"]}, {"user": "me"}, {"store": True}),
        *({"metadata": {"a": "b"}}, {"unheard_of": [1, {"x": None}]}, {"reasoning_effort": "low"}, {"top_logprobs": 0}),
    ],
)
def test_fields_without_effect(fields):
    assert options_of(**fields) == DEFAULTS


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": 0}, "max_tokens: 0; expected a number from 1"),
        ({"max_tokens": True}, "max_tokens: True; expected"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5; expected a whole number"),
        ({"max_completion_tokens": "8"}, "max_completion_tokens: '8'; expected"),
        ({"temperature": 2.1}, "temperature: 2.1; expected a number from 0 to 2"),
        ({"top_p": -0.1}, "top_p: -0.1"),
        ({"n": 17}, "n: 17; expected a number from 1 to 16"),
        ({"stop": [1]}, "stop: [1]; expected a text or a list of texts"),
        ({"stop": {"a": 1}}, "stop: "),
        *(({"stop": empty}, f"stop: {empty}; expected a text or a list") for empty in (False, {}, 0)),
        ({"stop": ["a"] * 17}, "17 texts; the limit is 16"),
        ({"stop": ["a", "b" * 257]}, "stop: a text of 257 characters; the limit is 256"),
        ({"stop": "b" * 257}, "stop: a text of 257 characters; the limit is 256"),
        ({"logprobs": 5}, "logprobs: 5; expected true or false"),
        ({"top_logprobs": 3}, "set logprobs to true"),
        ({"frequency_penalty": 0.5}, "0.5 is not supported by this server; use repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias: "),
        ({"response_format": {"type": "json_object"}}, "ask for it in the prompt"),
        ({"response_format": "text"}, "expected an object"),
        ({"tools": [{}]}, "tools: "),
        ({"tool_choice": "required"}, "tool_choice: 'required' is not supported"),
        ({"modalities": ["audio"]}, "modalities: "),
        ({"stream_options": [1]}, "stream_options: [1]; expected an object"),
        ({"messages": None}, "messages: None; expected a list"),
        ({"messages": ["hello"]}, "messages[0]: 'hello'; expected an object"),
        ({"messages": [{"role": "user"}, {"role": "tool"}]}, "messages[1].role: 'tool'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last message must be a question"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be a question"),
        ({"messages": [*shown(0), {"role": "system", "content": "x"}]}, "system messages come first"),
        ({"messages": [{"role": "assistant", "content": shown(0)[0]["content"]}]}, "only users show pictures"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "give a data URL"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]}, "expected an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: 5; expected a text"),
    ],
)
def test_fields_that_are_refused(fields, said):
    with pytest.raises(ApiError) as raised:
        read_chat({"messages": shown(0), **fields}, DEFAULTS)
    assert raised.value.status == 400 and said in raised.value.message
    assert raised.value.param.split(".")[0].split("[")[0] in {*fields, "messages"}


def test_messages_become_turns():
    text = {"type": "text", "text": "b"}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": [{"type": "text", "text": "D"}]},
        {"role": "assistant", "content": "welcome"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": [text, {"type": "image_url", "image_url": "data:,"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "c"},
    ]
    _, dialogue = read_chat({"messages": messages}, DEFAULTS)
    picture = PictureUrl("data:,", "messages[4].content[1].image_url")
    assert dialogue.system == "S\nD"
    assert dialogue.turns == [([], "welcome"), (["a", "b", picture], ""), (["c"], None)]
    assert dialogue.questions("\n") == ["", "<image>\na\nb", "c"]
    assert dialogue.pictures == [picture]


def test_many_messages_in_a_row_take_linear_time():
    messages = [{"role": "assistant", "content": "a" * 20}] * 200_000 + [{"role": "user", "content": "b"}]
    start = time.process_time()
    _, dialogue = read_chat({"messages": messages}, DEFAULTS)
    assert time.process_time() - start < 5
    assert dialogue.turns == [([], "\n".join(["a" * 20] * 200_000)), (["b"], None)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt: None; expected a text or a list of texts"),
        ({"prompt": [1, 2]}, "prompt: [1, 2]; expected a text"),
        ({"prompt": ["a"] * 65}, "65 texts; the limit is 64"),
        ({"prompt": "a", "echo": True}, "echo: True is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix: 'b' is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of: 3 is not supported"),
        ({"prompt": "a", "logprobs": 6}, "logprobs: 6; expected a number from 0 to 5"),
    ],
)
def test_completions_that_are_refused(fields, said):
    with pytest.raises(ApiError) as raised:
        read_completion(fields, DEFAULTS)
    assert said in raised.value.message


@pytest.mark.parametrize("text", [b"", b"{", b"NaN", b"[1e999]", b"[" * 100_000, b"\xff", b"1" * 5000, b'"\x00"'])
def test_broken_json(text):
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(text)


def test_values_that_are_nested_deeply():
    value = []
    for _ in range(100_000):
        value = [value]
    for fields, said in (({"tools": value}, "tools: [[[[...]]]] is not supported"), ({"stop": value}, "stop: ")):
        with pytest.raises(ApiError, match=re.escape(said)):
            read_chat({"messages": shown(0), **fields}, DEFAULTS)
    with pytest.raises(ApiError, match=re.escape("messages: 'aaaa")) as raised:
        read_chat({"messages": "a" * 100}, DEFAULTS)
    assert "aaa...; expected" in raised.value.message


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
KEYS = (
    *("model", "messages", "prompt", "n", "stop", "seed", "logprobs", "top_logprobs", "temperature", "top_p", "top_k"),
    *("repetition_penalty", "no_repeat_ngram_size", "max_tokens", "max_completion_tokens", "stream", "stream_options"),
    *("response_format", "tools", "tool_choice", "logit_bias", "frequency_penalty", "presence_penalty", "modalities"),
    *("echo", "suffix", "best_of", "user", "functions", "function_call", "audio", "min_p", "x"),
)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "input_audio"]) | VALUES,
        "text": VALUES,
        "image_url": VALUES,
    },
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | VALUES,
            "content": st.text() | st.lists(PARTS, max_size=3) | VALUES,
            "tool_calls": VALUES,
        },
    ),
    max_size=4,
)
BODIES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES


@settings(max_examples=500, deadline=None)
@given(BODIES, MESSAGES, st.booleans())
def test_any_body_is_read_or_refused(body, messages, replaces):
    if replaces and isinstance(body, dict):
        body = {**body, "messages": messages}
    body = json.loads(json.dumps(body))
    for read in (read_chat, read_completion):
        try:
            wishes, _ = read(body, DEFAULTS)
        except ApiError as error:
            assert error.status == 400
            json.dumps(error.body).encode()
        else:
            assert wishes.options.max_new_tokens >= 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("model"), max_seconds=20) as started:
        yield started


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2) | VALUES, MESSAGES, st.booleans(), st.booleans())
def test_the_server_never_fails(server, body, messages, replaces, is_chat):
    if isinstance(body, dict):
        body = {"max_tokens": 1, "model": "tiny", "prompt": "x", "messages": shown(0)} | body
        body |= {"messages": messages} if replaces else {}
        body["max_tokens"] = min(body["max_tokens"], 2) if isinstance(body["max_tokens"], int) else body["max_tokens"]
    content = json.dumps(body)
    answer = server.post("chat/completions" if is_chat else "completions", content=content)
    assert answer.status_code in (200, 400, 404), (content, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    assert server.scheduler.thread.is_alive()


def test_odd_requests_get_error_objects(server):
    for method, path, status in (
        ("GET", "/none", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = server.request(method, path)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]
    answer = server.post("chat/completions", content=b"{")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_choices_and_seeds(server):
    fields = {"temperature": 1.5, "seed": 5, "max_tokens": 6}
    answer = server.chat(n=3, **fields).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 18
    assert [server.text(**fields | {"seed": 5 + n}) for n in range(3)] == texts
    assert len({server.text(temperature=1.5, max_tokens=6) for _ in range(3)}) > 1


def test_stop_strings_and_log_probabilities(server):
    whole = server.chat(max_tokens=8, logprobs=True, top_logprobs=2).json()["choices"][0]
    text, tokens = whole["message"]["content"], whole["logprobs"]["content"]
    assert len(tokens) == 8
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] <= 0 for token in tokens)
    written = b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")
    # a control token that the model generates is no text
    assert written.replace("<|im_start|>", "").strip() == text
    stop = text[2:4]
    cut = server.chat(max_tokens=8, stop=[stop], logprobs=True).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.find(stop)].strip()
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", "stop_string")
    assert len(cut["logprobs"]["content"]) < 8 and cut["logprobs"]["content"][0]["top_logprobs"] == []


def test_an_empty_answer_is_an_empty_text(server):
    text = server.text(max_tokens=1)
    answer = server.chat(stop=text[0], max_tokens=4).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("", "stop")


def test_a_template_without_questions_needs_a_picture(tmp_path):
    model = load(write_tiny_opt(tmp_path, processor__template="opt"), cache=False)
    dialogue = read_messages([{"role": "user", "content": "What is this?"}])
    with pytest.raises(ApiError, match="template 'opt' needs a picture; give an image") as raised:
        chat_prompt(model, dialogue, [])
    assert raised.value.status == 400


def test_a_text_that_cannot_fit_is_not_tokenized(server, monkeypatch):
    """Neither a long one nor many turns without text; one that may fit is counted exactly."""
    turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    longest, limit = server.scheduler.model.processor.tokenizer.max_token_bytes, server.engine.max_length
    exact = server.chat("a " * limit).json()["error"]
    assert f"tokens but the context of this model holds {limit}" in exact["message"] and "least" not in exact["message"]
    monkeypatch.setattr(server.scheduler.model.processor.tokenizer, "encode", None)
    for answer, fewest in (
        (server.chat("é" * longest * limit), 2 * limit),
        (server.chat(messages=[*turn * 2 * limit, *shown(0)]), 2 * limit + 1),
        (server.post("completions", {"prompt": ["é" * longest * limit]}), 2 * limit),
    ):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert f"has at least {fewest} tokens but the context of this model holds {limit}; shorten" in error["message"]
