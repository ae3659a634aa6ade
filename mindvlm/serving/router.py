"""The routes of a router: it passes each request to a replica of its model, and the answer back as it comes.

Pages of documents and the web page, which need no model, it sends itself.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import Response

from mindvlm.serving.bodies import parsed, read_body
from mindvlm.serving.budget import ByteBudget, Share
from mindvlm.serving.documents import add_documents
from mindvlm.serving.errors import ApiError
from mindvlm.serving.fields import Fields, parse_json
from mindvlm.serving.fleet import Fleet, ServedModel
from mindvlm.serving.gate import new_app
from mindvlm.serving.page import add_page
from mindvlm.serving.replica import Replica
from mindvlm.serving.responses import LAST_LINE, data_line, error_response, json_response, unless_disconnected
from mindvlm.serving.router_metrics import RouterMetrics
from mindvlm.serving.settings import ServerSettings

ASKED_PATHS = ("/v1/chat/completions", "/v1/completions")

OWN_HEADERS = ("connection", "date", "transfer-encoding")
"""Headers that each server writes itself."""


def make_router(fleet: Fleet, settings: ServerSettings) -> FastAPI:
    """Returns the application."""
    metrics, bodies = RouterMetrics(fleet), ByteBudget(settings.max_bodies_bytes)
    app = new_app(settings, metrics.responses)

    @app.get("/health")
    async def health() -> Response:
        fleet.check_ready()
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(await metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [model.card for model in fleet.models if model.card]
        if not cards:
            raise fleet.models[0].unavailable()
        return json_response({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        found = fleet.find(name)
        if not found.card:
            raise found.unavailable()
        return json_response(found.card)

    async def ask(request: Request) -> Response:
        with contextlib.ExitStack() as stack:
            content = await read_body(request, settings, stack.enter_context(Share(bodies)))
            name, key = await parsed(content, read_target)
            return PassedOn(fleet.find(name), key, request.url.path, content, held=stack.pop_all())

    for path in ASKED_PATHS:
        app.add_api_route(path, ask, methods=["POST"])
    add_documents(app, settings, bodies)
    add_page(app)
    return app


def read_target(content: bytes) -> tuple[str | None, int]:
    """Returns the name of the model and the key of the conversation, for the body of a request.

    Raises:
        ApiError: it is no JSON object, or its model is no text.
    """
    fields = Fields(parse_json(content))
    return fields.text("model"), conversation_key(fields.values.get("messages"))


def conversation_key(messages: Any) -> int:
    """Returns a number that all turns of a conversation share; messages of a wrong type are refused later."""
    questions = messages if isinstance(messages, list) else []
    first = next((one for one in questions if isinstance(one, dict) and one.get("role") == "user"), None)
    try:
        return hash(json.dumps(first))
    except RecursionError:
        return 0


class PassedOn(Response):
    """The response of a replica, passed on as it comes. A client that disconnects ends the request at the replica.

    Args:
        model: its replicas.
        key: see `ServedModel.choose`.
        path, content: of the request.
        held: closed as soon as a replica has the content.
    """

    def __init__(self, model: ServedModel, key: int, path: str, content: bytes, *, held: contextlib.ExitStack):
        super().__init__()
        self.model, self.key, self.path, self.content, self.held = model, key, path, content, held

    async def __call__(self, scope, receive, send) -> None:
        with self.held:
            await self.answer(scope, receive, send)

    async def answer(self, scope, receive, send) -> None:
        lost: list[Replica] = []
        while True:
            replica = self.model.choose(self.key, lost)
            replica.num_running += 1
            try:
                await unless_disconnected(receive, self.pass_on(replica.client, scope, receive, send))
                return
            except httpx.ConnectError:
                # its process has just ended
                lost.append(replica)
            finally:
                replica.num_running -= 1

    async def pass_on(self, client: httpx.AsyncClient, scope, receive, send) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(self.content))}
        try:
            async with client.stream("POST", self.path, content=self.sent(), headers=headers) as answer:
                if answer.headers.get("content-type") == "text/event-stream":
                    await self.pass_events(answer, send)
                    return
                content = await answer.aread()
                response = Response(content, answer.status_code, passed_headers(answer))
        except httpx.ConnectError:
            raise
        except httpx.TransportError:
            response = error_response(self.lost())
        await response(scope, receive, send)

    async def sent(self) -> AsyncIterator[bytes]:
        """Yields the content, which is not kept then."""
        yield self.content
        self.content = b""
        self.held.close()

    async def pass_events(self, answer: httpx.Response, send) -> None:
        """Passes on the events of a stream. Those that a process cannot end are followed by an error."""
        headers = [(name.encode(), value.encode()) for name, value in passed_headers(answer).items()]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        rest = b""
        try:
            async for piece in answer.aiter_raw():
                # only whole ones, because the process may end in the middle of one
                events, end, rest = (rest + piece).rpartition(b"\n\n")
                if end:
                    await send({"type": "http.response.body", "body": events + end, "more_body": True})
        except httpx.TransportError:
            lines = data_line(self.lost().body) + LAST_LINE
            await send({"type": "http.response.body", "body": lines, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def lost(self) -> ApiError:
        message = f"the process of the model {self.model.name} has ended before its answer; try again"
        return ApiError(502, message, code="replica_failed")


def passed_headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS}
