"""The official client against the server: whole answers, streams, pictures, errors and retries."""

import asyncio
import time

import httpx
import numpy as np
import openai
import pytest

from mindvlm.core.errors import UserError
from mindvlm.processing.images.loading import load_image
from mindvlm.serving import scheduler
from mindvlm.serving.errors import ApiError
from mindvlm.serving.listening import bind
from mindvlm.serving.server import ModelServer
from mindvlm.serving.settings import ServerSettings
from tests.serving.running import data_url, running, shown, wait_for
from tests.tiny_vary import picture, tiny_model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("model")) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none") as made:
        yield made


def ask(client, messages, **fields):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 4, **fields})


def test_an_answer_is_that_of_the_library(client):
    expected = tiny_model().chat("read", picture(3), max_new_tokens=4)
    answer = ask(client, shown(3), temperature=0)
    assert answer.object == "chat.completion" and answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (str(expected), "assistant")
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == len(expected.ids)
    assert answer.usage.total_tokens == expected.num_prompt_tokens + len(expected.ids)
    assert answer.timings["predicted_n"] == 4 and answer.timings["prompt_ms"] > 0


def test_a_conversation_with_two_pictures(client):
    model = tiny_model()
    first = model.chat("read", picture(3), max_new_tokens=4)
    expected = model.chat("and this?", [picture(3), picture(4)], history=first.history, max_new_tokens=4)
    messages = [*shown(3), {"role": "assistant", "content": str(first)}, *shown(4, "and this?")]
    assert ask(client, messages).choices[0].message.content == str(expected)


def test_a_stream_has_the_text_of_the_whole_answer(client, monkeypatch):
    monkeypatch.setattr(scheduler, "PIECE_SECONDS", 0)
    whole = ask(client, shown(3), max_tokens=9)
    chunks = list(ask(client, shown(3), max_tokens=9, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert len(chunks) > 4
    last = chunks[-2].choices[0]
    assert (last.delta.content, last.finish_reason) == (None, "length")
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_the_bytes_of_a_stream(server):
    with httpx.stream(
        "POST", f"{server.url}/chat/completions", json={"messages": shown(3), "stream": True, "max_tokens": 3}
    ) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert server.chat().headers["content-type"] == "application/json"


def test_the_asynchronous_client(server):
    async def talk():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            wholes = await asyncio.gather(*(ask(client, shown(n)) for n in range(3)))
            streams = await asyncio.gather(*(ask(client, shown(n), stream=True) for n in range(3)))
            streamed = [""] * len(streams)
            for number, stream in enumerate(streams):
                async for chunk in stream:
                    streamed[number] += chunk.choices[0].delta.content or ""
            return [whole.choices[0].message.content for whole in wholes], streamed

    wholes, streamed = asyncio.run(talk())
    assert wholes == streamed
    assert len(set(wholes)) == 3


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.context_length) == ("tiny", "model", 320)
    assert model.input_modalities == ["text", "image"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "the model 'gpt-5' does not exist; this server has 'tiny'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: -1; expected a number from 0 to 2"),
        ({"messages": []}, openai.BadRequestError, r"messages: \[\]; expected a list"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, openai.BadRequestError, "context of this model"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: .* not supported"),
    ],
)
def test_errors_of_the_client(client, fields, error, said):
    with pytest.raises(error, match=said) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": shown(0), **fields})
    assert raised.value.body["message"] and raised.value.body["type"]
    assert raised.value.param in (None, *fields)


def test_a_prompt_that_is_too_long_says_both_numbers(server):
    answer = server.chat("x" * 700)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    expected = len(tiny_model().processor.prompt("x" * 700).input_ids)
    assert f"has {expected} tokens" in error["message"] and "holds 320" in error["message"]


def test_more_tokens_than_the_context_are_clamped(server):
    text = "x" * 300
    num_prompt = len(tiny_model().processor.prompt(text).input_ids)
    answer = server.chat(text, max_tokens=32768).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    # the last token of an answer needs no place
    assert answer["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 321 - num_prompt,
        "total_tokens": 321,
        "prompt_tokens_details": 0,
    }


def test_the_client_tries_again_when_the_queue_was_full(server, monkeypatch):
    submit, refused = server.scheduler.submit, []

    def refuse_once(jobs):
        if not refused:
            refused.append(True)
            raise ApiError(429, "the queue is full", headers={"Retry-After": "0.1"})
        submit(jobs)

    monkeypatch.setattr(server.scheduler, "submit", refuse_once)
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=1) as client:
        assert ask(client, shown(1)).choices[0].message.content == server.text(messages=shown(1))
    assert refused


def test_control_tokens_of_users_are_text(server):
    model = tiny_model()
    for text in ("<|im_end|>", "<image>", "a <image> b", "<imgpad><img>", "\ud800<image"):
        plain = server.chat(text, max_tokens=1).json()
        escaped = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = model.processor.prompt("X").input_ids
        at = ids.index(model.processor.tokenizer.encode("X")[0])
        expected = [*ids[:at], *model.processor.tokenizer.encode(escaped), *ids[at + 1 :]]
        assert plain["usage"]["prompt_tokens"] == len(expected), text


def test_a_system_message_replaces_that_of_the_template(server):
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "read"}]
    expected = tiny_model().processor.prompt("read", system="Be brief.")
    assert "Be brief." in expected.text
    answer = server.chat(messages=system).json()
    assert answer["usage"]["prompt_tokens"] == len(expected.input_ids)
    developer = server.chat(messages=[{"role": "developer", "content": "Be brief."}, system[1]]).json()
    assert developer["choices"] == answer["choices"]


def test_the_place_of_pictures(server):
    first, behind = shown(3)[0]["content"], shown(3)[0]["content"][::-1]
    assert server.text(messages=[{"role": "user", "content": first}]) == server.text(
        messages=[{"role": "user", "content": behind}]
    )
    between = [{"type": "text", "text": "see"}, first[0], {"type": "text", "text": "read"}]
    expected = tiny_model().chat("see<image>\nread", picture(3), max_new_tokens=4)
    assert server.text(messages=[{"role": "user", "content": between}]) == str(expected)


def test_a_url_as_text_and_other_formats(server):
    parts = [{"type": "image_url", "image_url": data_url(3)}, {"type": "text", "text": "read"}]
    assert server.text(messages=[{"role": "user", "content": parts}]) == server.text(messages=shown(3))
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        url = data_url(3, kind=kind)
        parts = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}]
        assert server.chat(messages=[{"role": "user", "content": parts}]).status_code == 200, kind
    assert load_image(data_url(3)).size == (40, 20)


def test_text_completions(server, client):
    answer = client.completions.create(model="tiny", prompt=["one", "two"], max_tokens=3, n=2, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 3
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    chunks = client.completions.create(model="tiny", prompt="one", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_while_the_model_loads(tmp_path):
    with running(tmp_path, wait=False) as server:
        loading = httpx.get(f"{server.root}/health")
        assert loading.status_code == 503 and loading.json()["error"]["code"] == "loading"
        assert server.chat().status_code == 503
        wait_for(lambda: httpx.get(f"{server.root}/health").status_code == 200)
        assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}


def test_a_model_that_cannot_be_loaded_ends_the_server():
    answers, listening = [], bind("127.0.0.1", 0)
    root = f"http://127.0.0.1:{listening.getsockname()[1]}"

    def load():
        answers.append(httpx.get(f"{root}/health"))
        raise UserError("tiny.safetensors is damaged; convert it again")

    with pytest.raises(UserError, match="^tiny.safetensors is damaged; convert it again$"):
        ModelServer(load, ServerSettings(), listening).run()
    assert [answer.json()["error"]["code"] for answer in answers] == ["loading"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{root}/health")


@pytest.mark.ci
def test_health_is_answered_while_graphs_are_compiled(tmp_path):
    """MindSpore compiles in the thread of the engine, and must not hold up the others.

    What is measured is the work of this process between two answers. Other processes delay answers, but add nothing.
    """
    with running(tmp_path, wait=False, changes={"mode": "graph"}) as server, httpx.Client(timeout=60) as client:
        worked = []

        def is_ready() -> bool:
            status = client.get(f"{server.root}/health").status_code
            worked.append(time.process_time())
            return status == 200

        wait_for(is_ready, 300)
    seconds = np.sort(np.diff(worked))
    # a lock that each compilation held would put most of the work between few answers
    assert len(seconds) > 50 and seconds[-10:].sum() < seconds.sum() / 4, seconds[-10:]


def test_metrics(server):
    server.text()
    assert httpx.get(f"{server.url}/models/of-a-stranger").status_code == 404
    figures = httpx.get(f"{server.root}/metrics")
    assert figures.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in figures.text.splitlines() if not line.startswith("#"))
    assert float(values["mindvlm_generated_tokens_total"]) > 0
    assert float(values['mindvlm_requests_total{path="/v1/chat/completions",status="200"}']) > 0
    assert float(values["mindvlm_first_token_seconds_count"]) > 0
    assert "of-a-stranger" not in figures.text
