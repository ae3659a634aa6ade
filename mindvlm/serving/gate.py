"""The application around the routes: error objects, API keys, origins of web pages, and the count of responses."""

import hmac
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import StarletteHTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from prometheus_client import Counter

from mindvlm.serving.budget import busy
from mindvlm.serving.errors import ApiError
from mindvlm.serving.page import PAGE_FILES
from mindvlm.serving.responses import error_response
from mindvlm.serving.settings import ServerSettings
from mindvlm.serving.sites import foreign_site

OPEN_PATHS = ("/health", *PAGE_FILES)
"""Paths that need no API key."""

MAX_REQUESTS = 256
"""Requests at the same time, health apart; others are refused with status 503."""


def new_app(settings: ServerSettings, responses: Counter) -> FastAPI:
    """Returns an application without routes.

    Args:
        responses: counts the responses by path and status.
    """
    # the framework's pages load scripts from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

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

    app.add_middleware(Gate, settings=settings, responses=responses)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


class Gate:
    """Checks the site and the API key of each request, limits their number and counts the responses.

    Args:
        app: the application behind it.
        settings: the accepted keys, names and origins.
        responses: counts by path and status.
    """

    def __init__(self, app, settings: ServerSettings, responses: Counter):
        self.app, self.settings, self.responses, self.num_requests = app, settings, responses, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                # the path of a request may be anything, and each one would be kept
                path = getattr(scope.get("route"), "path", "other")
                self.responses.labels(path, message["status"]).inc()
            await send(message)

        error = self.refusal(scope)
        if error:
            await error_response(error)(scope, receive, counted)
            return
        # health is always answered
        weight = int(scope["path"] not in OPEN_PATHS)
        self.num_requests += weight
        try:
            await self.app(scope, receive, counted)
        finally:
            self.num_requests -= weight

    def refusal(self, scope) -> ApiError | None:
        """Returns the error for a request that is not handled."""
        if scope["path"] in OPEN_PATHS:
            return None
        headers, settings = dict(scope["headers"]), self.settings
        if error := foreign_site(headers, settings.own_names, settings.cors_origins):
            return error
        if not self.is_allowed(headers):
            return ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.num_requests >= MAX_REQUESTS:
            return busy(f"{self.num_requests} requests are under way")
        return None

    def is_allowed(self, headers: Mapping[bytes, bytes]) -> bool:
        if not self.settings.api_keys:
            return True
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # all keys are compared, so that the time tells nothing
        matches = [hmac.compare_digest(key.strip(), one.encode()) for one in self.settings.api_keys]
        return scheme.lower() == b"bearer" and any(matches)
