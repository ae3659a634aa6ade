"""The routes of the server: OpenAI's chat completions, completions and models, pages of documents, health, metrics, and
the web page."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from mindvlm.processing.images.picture import Picture
from mindvlm.serving.answers import Answers, EventStream, Receiver
from mindvlm.serving.bodies import read_json
from mindvlm.serving.budget import ByteBudget, Share
from mindvlm.serving.documents import add_documents
from mindvlm.serving.errors import ApiError, shown
from mindvlm.serving.gate import new_app
from mindvlm.serving.jobs import Job
from mindvlm.serving.messages import Dialogue, PictureUrl
from mindvlm.serving.metrics import Metrics
from mindvlm.serving.page import add_page
from mindvlm.serving.picture_reader import PictureReader
from mindvlm.serving.pictures import read_files
from mindvlm.serving.prompts import Prompt, chat_prompt, check_dialogue, text_prompt
from mindvlm.serving.replies import ChatReply, TextReply
from mindvlm.serving.requests import Wishes, read_chat, read_completion
from mindvlm.serving.responses import json_response, uncancelled, unless_disconnected
from mindvlm.serving.scheduler import Scheduler
from mindvlm.serving.settings import ServerSettings
from mindvlm.sessions.vision_language_model import VisionLanguageModel

MAX_TOKENIZED = 2
"""Requests whose texts are tokenized at the same time."""

MAX_SHORT_TEXTS, MAX_SHORT_LENGTH = 3, 200
"""Texts of a conversation and their characters that are tokenized in 0.1 ms, in which a thread takes a task."""

MAX_FETCHED = 8
"""Pictures that are fetched from other machines at the same time, in threads of their own."""


class Service:
    """What the routes share.

    Args:
        scheduler: generates the answers.
    """

    def __init__(self, scheduler: Scheduler, settings: ServerSettings, metrics: Metrics):
        self.scheduler, self.settings, self.metrics = scheduler, settings, metrics
        self.created = int(time.time())
        self.pictures = PictureReader(scheduler, settings.picture_cache_bytes)
        self.num_reading = 0
        self.tokenizing = asyncio.Semaphore(MAX_TOKENIZED)
        self.fetchers = ThreadPoolExecutor(MAX_FETCHED, "fetcher")
        self.bodies = ByteBudget(settings.max_bodies_bytes)

    @property
    def model(self) -> VisionLanguageModel:
        """The model. Raises ApiError while it is loading."""
        if self.scheduler.model is None:
            headers = {"Retry-After": "2"}
            raise ApiError(503, "the model is loading; try again in a moment", code="loading", headers=headers)
        return self.scheduler.model

    @property
    def model_name(self) -> str:
        return self.settings.model_name or self.model.config.name

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError if a request names another model."""
        if asked is not None and asked != self.model_name and not self.settings.any_model:
            raise ApiError(
                404,
                f"the model {shown(asked)} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def card(self) -> dict[str, Any]:
        """Returns the entry of the model in `/v1/models`."""
        length = self.model.engine.max_length
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "mindvlm",
            "context_length": length,
            "max_model_len": length,
            "max_pictures": self.settings.max_pictures,
            "input_modalities": ["text", "image"],
            "output_modalities": ["text"],
            "scope": asdict(self.model.scope),
        }

    async def chat(self, request: Request) -> Response:
        """Returns the response to a chat request."""
        asked_at, model = time.monotonic(), self.model
        with ExitStack() as stack:
            share = stack.enter_context(Share(self.bodies))
            wishes, dialogue = read_chat(await read_json(request, self.settings, share), model.config.generation)
            self.check_model(wishes.model)
            check_dialogue(model, dialogue)
            prompts = self.chat_prompts(dialogue, share, wishes.num_choices)
            # the coroutine alone holds the data URLs until it has read them, and the share with them
            del dialogue
            held = stack.pop_all()
        reply = ChatReply(self.model_name, model.processor.tokenizer, wishes.num_choices)
        return await self.answer(request, prompts, wishes, reply, asked_at=asked_at, after=held.close)

    async def chat_prompts(self, dialogue: Dialogue, share: Share, num_choices: int) -> list[Prompt]:
        """Returns the prompt of a conversation, whose pictures it reads. Raises ApiError."""
        pictures = await self.read_pictures(dialogue.pictures, share, num_choices)
        texts = dialogue.texts
        if len(texts) <= MAX_SHORT_TEXTS and sum(map(len, texts)) <= MAX_SHORT_LENGTH:
            return [chat_prompt(self.model, dialogue, pictures)]
        async with self.tokenizing:
            return [await uncancelled(asyncio.to_thread(chat_prompt, self.model, dialogue, pictures))]

    async def read_pictures(self, urls: Sequence[PictureUrl], share: Share, num_choices: int) -> list[Picture]:
        """Returns pictures. Raises ApiError if one cannot be read, there is no room, or it takes too long."""
        if not urls:
            return []

        async def read() -> list[Picture]:
            contents = await read_files(urls, self.settings, self.fetchers, share)
            return await self.pictures.read(list(zip(urls, contents, strict=True)))

        self.scheduler.check_room(num_choices, self.num_reading)
        self.num_reading += num_choices
        try:
            return await asyncio.wait_for(read(), self.settings.max_seconds)
        except asyncio.TimeoutError:
            raise self.scheduler.too_slow("send fewer or smaller pictures") from None
        finally:
            self.num_reading -= num_choices

    async def complete(self, request: Request) -> Response:
        """Returns the response to a request for a text completion."""
        asked_at, model = time.monotonic(), self.model
        with Share(self.bodies) as share:
            body = await read_json(request, self.settings, share)
            wishes, texts = read_completion(body, model.config.generation)
            self.check_model(wishes.model)
        reply = TextReply(self.model_name, model.processor.tokenizer, wishes.num_choices)
        return await self.answer(request, self.text_prompts(texts), wishes, reply, asked_at=asked_at)

    async def text_prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Returns the prompts of texts. Raises ApiError."""
        async with self.tokenizing:
            return [await uncancelled(asyncio.to_thread(text_prompt, self.model, text)) for text in texts]

    def jobs(
        self, prompts: list[Prompt], wishes: Wishes, receiver: Callable[[int], Receiver], asked_at: float
    ) -> list[Job]:
        """Returns a job for each choice of each prompt."""
        return [
            Job(
                prompt=prompt,
                options=wishes.options,
                seed=wishes.seed + choice,
                text=self.model.new_text(wishes.options),
                receive=receiver(number * wishes.num_choices + choice),
                streams=wishes.streams,
                top_logprobs=wishes.top_logprobs,
                asked_at=asked_at,
                expires=asked_at + self.settings.max_seconds,
            )
            for number, prompt in enumerate(prompts)
            for choice in range(wishes.num_choices)
        ]

    async def answer(
        self,
        request: Request,
        prompts: Coroutine[Any, Any, list[Prompt]],
        wishes: Wishes,
        reply: ChatReply,
        *,
        asked_at: float,
        after: Callable[[], None] = lambda: None,
    ) -> Response:
        """Returns the response with the answers to prompts.

        Args:
            asked_at: `time.monotonic()` of the request.
            after: called when the prompts are made, or will not be.
        """

        async def make_jobs(receiver: Callable[[int], Receiver]) -> list[Job]:
            return self.jobs(await prompts, wishes, receiver, asked_at)

        answers = Answers(self.scheduler, make_jobs, after)
        try:
            if not wishes.streams:
                events = await unless_disconnected(request.receive, answers.whole())
                return Response(status_code=499) if events is None else json_response(reply.whole(events))
            first = await unless_disconnected(request.receive, answers.next())
            if first and first[1].error:
                raise first[1].error
            stream, answers = EventStream(answers, first, reply, include_usage=wishes.include_usage), None
            return stream
        finally:
            if answers:
                answers.close()


def make_app(service: Service) -> FastAPI:
    """Returns the application."""
    settings = service.settings
    app = new_app(settings, service.metrics.requests)

    @app.get("/health")
    async def health() -> Response:
        service.model  # noqa: B018
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(service.card())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await service.complete(request)

    add_documents(app, settings, service.bodies)
    add_page(app)
    return app
