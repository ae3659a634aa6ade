"""Errors of the API: OpenAI's error object with a status."""

import reprlib
from collections.abc import Mapping
from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

# a request may be nested so deeply that `repr` fails
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxstring, _BRIEF.maxlong = 3, 10, 10, 100, 100


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: one line with the thing, the value and the remedy.
        param: the field of the request.
        code: a short name for programs.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_field(param: str, problem: str) -> ApiError:
    """Returns the error for a field that a client can correct."""
    return ApiError(400, f"{param}: {problem}", param=param)


def shown(value: Any) -> str:
    """Returns a value of a request for messages, cut if it is long."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
