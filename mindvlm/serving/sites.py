"""Refusal of the requests that web pages of other sites make in a browser of this machine.

A server without API keys that listens on this machine alone would answer every page that its user visits. A page may
send a question without asking first, and may call the server by a name of its own, whose address becomes 127.0.0.1.
"""

import ipaddress
import socket
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import urlsplit

from mindvlm.serving.errors import ApiError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
REMEDY = "list the origin of the page, such as http://localhost:3000, in --cors_origins, or set an --api_key_file"


def own_names(host: str, origins: Sequence[str]) -> tuple[str, ...]:
    """Returns the names by which a server without keys may be called; none if others than this machine reach it.

    Args:
        host: the address to listen on.
        origins: of web pages that may ask; "*" for all.
    """
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
        is_local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except (OSError, ValueError):
        # `bind` says what is wrong
        return ()
    if not is_local or "*" in origins:
        return ()
    return (*LOCAL_NAMES, host.lower(), *(name for origin in origins if (name := name_in(origin))))


def foreign_site(headers: Mapping[bytes, bytes], names: Collection[str], origins: Collection[str]) -> ApiError | None:
    """Returns the error for a request that calls the server by another name, or comes from a page of another origin.

    Args:
        headers: of the request, with names in lower case.
        names: those of the server; without any, every request is accepted.
        origins: of other web pages that may ask.
    """
    if not names:
        return None
    # clients before HTTP/1.1 may leave it out, browsers never do
    host = headers.get(b"host", b"localhost").decode("latin-1")
    if name_in(f"//{host}") not in names:
        return refusal(f"the Host {host[:100]!r} is none of {', '.join(dict.fromkeys(names))}")
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and origin not in origins and origin.partition("://")[2] != host:
        return refusal(f"web pages of {origin[:100]!r} may not ask this server")
    return None


def name_in(url: str) -> str | None:
    """Returns the name of the host in a URL; None if there is none."""
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return None
    return name and name.rstrip(".")


def refusal(problem: str) -> ApiError:
    return ApiError(403, f"{problem}; {REMEDY}", code="foreign_site")
