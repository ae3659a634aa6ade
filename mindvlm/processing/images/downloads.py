"""Downloads of pictures and documents within limits of hosts, bytes and time.

A server fetches what strangers name only from allowed hosts in the public network.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from mindvlm.core.errors import UserError
from mindvlm.processing.images.sources import printable, short_name

MAX_REDIRECTS = 10
SILENT_SECONDS = 60
"""Time without a byte after which a connection has failed."""
CHUNK = 2**20
DEFAULT_PORTS = {"http": 80, "https": 443}
_KEPT = "/%:@!$&'()*+,;=~?"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_OTHER_NETWORKS = [
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "168.63.129.16/32")
]
"""Reserved networks, and an address of services inside a cloud, which `ipaddress` counts as public."""


@dataclass(frozen=True)
class Target:
    """The parts of a URL that may be fetched."""

    scheme: str
    host: str
    port: int
    path: str


def download(
    url: str,
    file: BinaryIO,
    *,
    hosts: Collection[str] | None,
    max_bytes: int,
    seconds: float,
    allow_private: bool = False,
) -> None:
    """Writes the content of an http(s) URL to a file.

    Each redirect is checked like the first URL. The addresses that were checked are those that are connected, so that
    a name server cannot give another one in between. No proxy is used.

    Args:
        hosts: allowed hosts: "host", "host:port", "*.domain" or "*.domain:port" for all hosts below a domain,
            or "*". Without a port, those of http and https are allowed. None allows all hosts and ports.
        max_bytes: limit of the content.
        seconds: time for everything.
        allow_private: whether the host may be one of a private network, for URLs of the user's own command line. A
            public host still cannot redirect to a private one.

    Raises:
        UserError: the URL or a redirect names another host or an address that is not public, the host does not answer
            in time or with a file, or the content is too large or cannot be written.
    """
    end, name = time.monotonic() + seconds, short_name(url)
    for num_redirects in range(MAX_REDIRECTS + 1):
        try:
            target = allowed_target(url, hosts)
            addresses = addresses_of(target)
            allow_private = check_addresses(target, addresses, allow_private)
        except UserError:
            if num_redirects == 0:
                raise
            # what a redirect names is not for the one who asks
            raise UserError(
                f"{name}: redirects to an address whose pictures are not fetched; give another URL"
            ) from None
        try:
            location = fetch(target, addresses, file, max_bytes, end)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) if num_redirects == 0 and str(error) else type(error).__name__
            reason = "it took too long" if time.monotonic() >= end else printable(reason)
            raise UserError(f"{name}: cannot be downloaded ({reason}); check the address and the network") from None
        if location is None:
            return
        url = urljoin(url, location)
    raise UserError(f"{name}: more than {MAX_REDIRECTS} redirects; give the URL of the picture itself")


def check_addresses(target: Target, addresses: Sequence[str], allow_private: bool) -> bool:
    """Returns whether a redirect may lead to a private network. Raises UserError if an address is private itself."""
    if all(map(is_public, addresses)):
        return False
    if not allow_private:
        raise UserError(f"the host {target.host!r} is not in the public network; its pictures are not fetched")
    return True


def allowed_target(url: str, hosts: Collection[str] | None) -> Target:
    """Returns the parts of a URL. Raises UserError if it is malformed or its host is not allowed."""
    malformed = UserError(f"{short_name(url)}: not a plain http or https URL; give https://host/path")
    if not url.isprintable() or "\\" in url:
        raise malformed
    try:
        parts = urlsplit(url)
        host = ascii_host(parts.hostname or "")
        port = parts.port or DEFAULT_PORTS[parts.scheme.lower()]
    except (ValueError, KeyError):
        raise malformed from None
    if not host or "@" in parts.netloc:
        raise malformed
    if hosts is not None:
        names = {host, "*", *(f"*.{host.split('.', n)[n]}" for n in range(1, host.count(".") + 1))}
        entries = {f"{name}:{port}" for name in names} | (names if port in DEFAULT_PORTS.values() else set())
        if entries.isdisjoint(map(ascii_host, hosts)):
            raise UserError(f"{short_name(url)}: pictures of the host {host!r} at port {port} are not allowed here")
    path = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    return Target(parts.scheme.lower(), host, port, path)


def ascii_host(text: str) -> str:
    """Returns "host", "host:port" or an IPv6 address in its usual form: ASCII, lower case, without a final dot.

    Raises:
        ValueError: there is no such form.
    """
    if text.count(":") > 1:
        return str(ipaddress.ip_address(text))
    host, colon, port = text.partition(":")
    return host.rstrip(".").encode("idna").decode().lower() + colon + port


def addresses_of(target: Target) -> list[str]:
    """Returns the addresses of a host. Raises UserError if it has none."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise UserError(f"the host {target.host!r} has no address; check the URL and the network")
    return [entry[4][0] for entry in found]


def is_public(text: str) -> bool:
    """Whether an address is one of the public network; those that embed an IPv4 address are as public as it is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if address.version == 6:
        if address.teredo or address.is_site_local:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    if any(address in network for network in _OTHER_NETWORKS):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def fetch(target: Target, addresses: Sequence[str], file: BinaryIO, max_bytes: int, end: float) -> str | None:
    """Writes the content to a file, or returns the location of a redirect.

    Raises:
        UserError: the server answers with an error or too many bytes; the message lacks the URL.
        OSError, HTTPException: the connection fails.
    """
    default = DEFAULT_PORTS[target.scheme]
    name = f"[{target.host}]" if ":" in target.host else target.host
    headers = {
        "Host": name if target.port == default else f"{name}:{target.port}",
        "User-Agent": "mindvlm",
        "Accept": "image/*, application/pdf, */*;q=0.5",
        "Connection": "close",
    }
    with connected(addresses, target.port, end) as plain, ended_at(end, plain), secured(plain, target) as stream:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = stream
        connection.request("GET", target.path, headers=headers)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
            return location
        if response.status != 200:
            raise UserError(f"the server answers {response.status} {printable(response.reason)}; check the address")
        num_bytes = 0
        while chunk := response.read(CHUNK):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise UserError(f"more than {max_bytes} bytes, the limit; give a smaller file")
            file.write(chunk)
        if time.monotonic() >= end or response.length:
            raise http.client.HTTPException("the connection ended early")
    return None


def connected(addresses: Sequence[str], port: int, end: float) -> socket.socket:
    """Returns a connection to the first address that accepts one. Raises OSError."""
    for address in addresses:
        try:
            timeout = min(max(end - time.monotonic(), 0.001), SILENT_SECONDS)
            return socket.create_connection((address, port), timeout=timeout)
        except OSError:
            if address == addresses[-1]:
                raise


@contextlib.contextmanager
def secured(plain: socket.socket, target: Target) -> Iterator[socket.socket]:
    """Wraps a connection in TLS, with the certificate of the host, if the URL is one of https."""
    if target.scheme == "http":
        yield plain
        return
    with ssl.create_default_context().wrap_socket(plain, server_hostname=target.host) as wrapped:
        yield wrapped


@contextlib.contextmanager
def ended_at(end: float, plain: socket.socket) -> Iterator[None]:
    """Ends a connection at a time, because a host that sends a byte now and then keeps all other limits."""
    # TLS detaches the socket that it wraps
    handle = plain.dup()

    def shut() -> None:
        with contextlib.suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(end - time.monotonic(), 0), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        handle.close()
