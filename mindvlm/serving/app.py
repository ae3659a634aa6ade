"""The routes of the server: OpenAI's chat completions, completions and models, health and metrics."""

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import StarletteHTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from mindvlm.serving.answers import Answers, EventStream, Receiver, json_bytes, unless_disconnected
from mindvlm.serving.bodies import read_json
from mindvlm.serving.errors import ApiError, shown
from mindvlm.serving.jobs import Job
from mindvlm.serving.metrics import Metrics
from mindvlm.serving.pictures import read_pictures
from mindvlm.serving.prompts import PictureCache, Prompt, chat_prompt, text_prompt
from mindvlm.serving.replies import ChatReply, TextReply
from mindvlm.serving.requests import Wishes, read_chat, read_completion
from mindvlm.serving.scheduler import Scheduler
from mindvlm.serving.settings import ServerSettings
from mindvlm.sessions.vision_language_model import VisionLanguageModel

MAX_DECODED = 2
"""Requests whose pictures are decoded at the same time, which limits the memory for them."""

MAX_FETCHED = 8
"""Pictures that are fetched from other machines at the same time."""

OPEN_PATHS = ("/health",)
"""Paths that need no API key."""


class Service:
    """What the routes share.

    Args:
        scheduler: generates the answers.
    """

    def __init__(self, scheduler: Scheduler, settings: ServerSettings, metrics: Metrics):
        self.scheduler, self.settings, self.metrics = scheduler, settings, metrics
        self.created = int(time.time())
        self.pictures = PictureCache()
        self.decoding, self.fetching = asyncio.Semaphore(MAX_DECODED), asyncio.Semaphore(MAX_FETCHED)

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
            "input_modalities": ["text", "image"],
            "output_modalities": ["text"],
        }

    def jobs(self, prompts: list[Prompt], wishes: Wishes, receiver: Callable[[int], Receiver]) -> list[Job]:
        """Returns a job for each choice of each prompt."""
        expires = time.monotonic() + self.settings.max_seconds
        return [
            Job(
                prompt=prompt,
                options=wishes.options,
                seed=wishes.seed + choice,
                text=self.model.new_text(wishes.options),
                receive=receiver(number * wishes.num_choices + choice),
                streams=wishes.streams,
                top_logprobs=wishes.top_logprobs,
                expires=expires,
            )
            for number, prompt in enumerate(prompts)
            for choice in range(wishes.num_choices)
        ]

    async def answer(self, request: Request, prompts: list[Prompt], wishes: Wishes, reply: ChatReply):
        """Returns the response with the answers to the prompts."""
        answers = Answers(self.scheduler, lambda receiver: self.jobs(prompts, wishes, receiver))
        try:
            if not wishes.streams:
                events = await unless_disconnected(request.receive, answers.whole())
                return Response(status_code=499) if events is None else json_response(reply.whole(events))
            first = await answers.next()
            if first and first[1].error:
                raise first[1].error
            stream, answers = EventStream(answers, first, reply, include_usage=wishes.include_usage), None
            return stream
        finally:
            if answers:
                answers.close()


def make_app(service: Service) -> FastAPI:
    """Returns the application."""
    # the framework's pages load scripts from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    settings = service.settings

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
    async def chat(request: Request):
        loaded = service.model
        wishes, dialogue = read_chat(await read_json(request, settings), loaded.config.generation)
        service.check_model(wishes.model)
        contents = await read_pictures(dialogue.pictures, settings, service.fetching)
        async with service.decoding:
            prompt = await asyncio.to_thread(chat_prompt, loaded, dialogue, contents, service.pictures)
        reply = ChatReply(service.model_name, loaded.processor.tokenizer)
        return await service.answer(request, [prompt], wishes, reply)

    @app.post("/v1/completions")
    async def complete(request: Request):
        loaded = service.model
        wishes, texts = read_completion(await read_json(request, settings), loaded.config.generation)
        service.check_model(wishes.model)
        prompts = [await asyncio.to_thread(text_prompt, loaded, text) for text in texts]
        reply = TextReply(service.model_name, loaded.processor.tokenizer)
        return await service.answer(request, prompts, wishes, reply)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(StarletteHTTPException)
    async def refuse_path(request: Request, error: StarletteHTTPException) -> Response:
        problem = "no such path" if error.status_code == 404 else str(error.detail)
        message = f"{request.method} {request.url.path}: {problem}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server failed; see its log", code="internal_error"))

    app.add_middleware(Gate, service=service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


class Gate:
    """Checks the API key of each request and counts the responses.

    Args:
        app: the application behind it.
        service: has the accepted keys.
    """

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                # the path of a request may be anything, and each one would be kept
                path = getattr(scope.get("route"), "path", "other")
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        if self.is_allowed(scope):
            await self.app(scope, receive, counted)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, counted)

    def is_allowed(self, scope) -> bool:
        keys = self.service.settings.api_keys
        if not keys or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # all keys are compared, so that the time tells nothing
        matches = [hmac.compare_digest(key.strip(), one.encode()) for one in keys]
        return scheme.lower() == b"bearer" and any(matches)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status_code=status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)
