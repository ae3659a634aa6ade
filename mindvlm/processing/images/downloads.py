"""Downloads of pictures from allowed public hosts, for programs that fetch what strangers name."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from mindvlm.core.errors import UserError
from mindvlm.processing.images.sources import short_name

MAX_REDIRECTS = 3
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


def download(url: str, *, hosts: Collection[str], max_bytes: int, seconds: float) -> bytes:
    """Returns the content of an http(s) URL.

    Each redirect is checked like the first URL. The address that was checked is the one that is connected, so that a
    name server cannot give another one in between. No proxy is used.

    Args:
        hosts: allowed hosts: "host", "host:port", "*.domain" for all hosts below a domain, or "*". Without a port,
            those of http and https are allowed.
        max_bytes: limit of the content.
        seconds: time for everything.

    Raises:
        UserError: the URL or a redirect names another host or an address that is not public, the host does not answer
            in time or with a file, or the file is too large.
    """
    end = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        target = allowed_target(url, hosts)
        address = public_address(target)
        try:
            found = fetch(target, address, max_bytes, end)
        except (OSError, http.client.HTTPException) as error:
            reason = "it took too long" if time.monotonic() >= end else str(error) or type(error).__name__
            raise UserError(f"{short_name(url)}: cannot be fetched ({reason}); check the URL") from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise UserError(f"{short_name(url)}: more than {MAX_REDIRECTS} redirects; give the URL of the picture itself")


def allowed_target(url: str, hosts: Collection[str]) -> Target:
    """Returns the parts of a URL. Raises UserError if it is malformed or its host is not allowed."""
    malformed = UserError(f"{short_name(url)}: not a plain http or https URL; give https://host/path")
    if not url.isprintable() or "\\" in url:
        raise malformed
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").encode("idna").decode().lower()
        port = parts.port or DEFAULT_PORTS[parts.scheme.lower()]
    except (ValueError, KeyError):
        raise malformed from None
    if not host or "@" in parts.netloc:
        raise malformed
    names = {host, "*", *(f"*.{host.split('.', n)[n]}" for n in range(1, host.count(".") + 1))}
    allowed = {entry.lower().rstrip(".") for entry in hosts}
    if not (f"{host}:{port}" in allowed or (port in DEFAULT_PORTS.values() and names & allowed)):
        raise UserError(f"{short_name(url)}: pictures of the host {host!r} at port {port} are not allowed here")
    path = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    return Target(parts.scheme.lower(), host, port, path)


def public_address(target: Target) -> str:
    """Returns an address of a host. Raises UserError if it has none or one that is not public."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"the host {target.host!r} has no address; check the URL") from None
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise UserError(f"the host {target.host!r} is not in the public network; its pictures are not fetched")
    return addresses[0]


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


def fetch(target: Target, address: str, max_bytes: int, end: float) -> bytes | str:
    """Returns the content, or the location of a redirect."""
    default = DEFAULT_PORTS[target.scheme]
    name = f"[{target.host}]" if ":" in target.host else target.host
    host = name if target.port == default else f"{name}:{target.port}"
    with socket.create_connection((address, target.port), timeout=max(end - time.monotonic(), 0.001)) as plain:
        with ended_at(end, plain), secured(plain, target) as connected:
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = connected
            connection.request("GET", target.path, headers={"Host": host, "Accept": "image/*", "Connection": "close"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
                return location
            if response.status != 200:
                raise http.client.HTTPException(f"status {response.status}")
            content = response.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise http.client.HTTPException(f"more than {max_bytes} bytes")
            if time.monotonic() >= end or response.length:
                raise http.client.HTTPException("the connection ended early")
    return content


@contextlib.contextmanager
def secured(plain: socket.socket, target: Target) -> Iterator[socket.socket]:
    """Wraps a connection in TLS, with the certificate of the host, if the URL is one of https."""
    if target.scheme == "http":
        yield plain
        return
    with ssl.create_default_context().wrap_socket(plain, server_hostname=target.host) as wrapped:
        yield wrapped


@contextlib.contextmanager
def ended_at(end: float, connected: socket.socket) -> Iterator[None]:
    """Ends a connection at a time, because a host that sends a byte now and then keeps all other limits."""
    # TLS detaches the socket that it wraps
    handle = connected.dup()

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
