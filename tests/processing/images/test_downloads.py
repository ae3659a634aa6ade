"""Only allowed hosts in the public network are asked for pictures, whatever a URL looks like."""

import http.server
import io
import socket
import ssl
import threading
import time

import pytest

from mindvlm.core.errors import UserError
from mindvlm.processing.images import downloads
from mindvlm.processing.images.downloads import allowed_target, download, is_public

LIMITS = {"max_bytes": 1000, "seconds": 5}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path == "/slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.server.ended.wait(0.05):
                try:
                    self.wfile.write(b"X: y\r\n")
                except OSError:
                    return
            return
        places = {
            "/moved": "/a.png",
            "/out": "http://evil.example/a.png",
            "/in": "http://localhost:1/",
            "/loop": "/loop",
        }
        body = b"picture" if self.path in ("/a.png", "/a%20b?q=1") else b"x" * 5000
        status = 302 if self.path in places else 404 if self.path == "/none" else 200
        self.send_response(*((404, "No\rpage") if self.path == "/odd" else (status,)))
        if self.path in places:
            self.send_header("Location", places[self.path])
        self.send_header("Content-Length", str(len(body) + (self.path == "/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server of this machine that counts as public, with its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.ended, server.daemon_threads = [], threading.Event(), True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setattr(
            socket, "getaddrinfo", lookup({"pictures.example": "127.0.0.1", "evil.example": "127.0.0.1"})
        )
        yield server
        server.ended.set()
        server.shutdown()


def lookup(known: dict[str, str], original=socket.getaddrinfo):
    """Returns a `getaddrinfo` that knows some names."""

    def find(host, port, *arguments, **options):
        return original(known.get(host, host), port, *arguments, **options)

    return find


def get(site, path: str, **options) -> bytes:
    port = site.server_address[1]
    hosts = options.pop("hosts", [f"pictures.example:{port}"])
    return content(f"http://pictures.example:{port}{path}", hosts=hosts, **LIMITS | options)


def content(url: str, **options) -> bytes:
    file = io.BytesIO()
    download(url, file, **options)
    return file.getvalue()


def test_a_picture_and_a_redirect(site):
    assert get(site, "/a.png") == b"picture"
    assert get(site, "/moved") == b"picture"
    assert get(site, "/a b?q=1") == b"picture"
    assert site.asked[0] == ("/a.png", f"pictures.example:{site.server_address[1]}")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/out", "redirects to an address whose pictures are not fetched"),
        ("/in", "redirects to an address whose pictures are not fetched"),
        ("/loop", "more than 10 redirects"),
        ("/none", "the server answers 404 Not Found"),
        ("/odd", r"the server answers 404 No\\rpage; check the address$"),
        ("/large", "more than 1000 bytes"),
    ],
)
def test_what_is_not_fetched(site, path, said):
    with pytest.raises(UserError, match=said) as raised:
        get(site, path)
    assert str(raised.value).startswith(f"http://pictures.example:{site.server_address[1]}{path}: ")
    assert not any(host in str(raised.value) for host in ("evil", "localhost"))


def test_a_redirect_that_fails_names_no_host(site, monkeypatch):
    """A certificate's error, for example, has the name of the host in it."""
    original = downloads.fetch

    def fail(target, *rest):
        if target.path == "/a.png":
            raise ssl.SSLCertVerificationError("the certificate is not valid for 'secret.example'")
        return original(target, *rest)

    monkeypatch.setattr(downloads, "fetch", fail)
    with pytest.raises(UserError, match=r"/moved: cannot be downloaded \(SSLCertVerificationError\)"):
        get(site, "/moved")


def test_an_answer_that_ends_early(site):
    assert len(get(site, "/large", max_bytes=5000)) == 5000
    with pytest.raises(UserError, match="the connection ended early"):
        get(site, "/short", max_bytes=9000)


def test_a_private_host_that_the_user_names(site, monkeypatch):
    """It may lead to others; a public host may not lead to it."""
    monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.2")
    known = {"pictures.example": "127.0.0.1", "public.example": "127.0.0.2"}
    monkeypatch.setattr(socket, "getaddrinfo", lookup(known))
    port = site.server_address[1]
    options = {"hosts": None, **LIMITS}
    private, moved = f"http://pictures.example:{port}/a.png", f"http://pictures.example:{port}/moved"
    for url in (private, moved):
        assert content(url, allow_private=True, **options) == b"picture"
        with pytest.raises(UserError, match="not in the public network"):
            content(url, **options)
    monkeypatch.setattr(downloads, "fetch", lambda target, *rest: private)
    with pytest.raises(UserError, match="http://public.example/: redirects to an address whose"):
        content("http://public.example/", allow_private=True, **options)


def test_the_second_address_of_a_host(site, monkeypatch):
    monkeypatch.setattr(downloads, "addresses_of", lambda target: ["127.0.0.3", "127.0.0.1"])
    monkeypatch.setattr(downloads, "is_public", lambda address: True)
    assert get(site, "/a.png") == b"picture"


def test_a_host_that_sends_a_byte_now_and_then(site):
    start = time.monotonic()
    with pytest.raises(UserError, match="it took too long"):
        get(site, "/slow", seconds=0.5)
    assert time.monotonic() - start < 3


def test_the_time_of_a_connection_that_has_moved_into_tls():
    connected, other = socket.socketpair()
    with other, downloads.ended_at(time.monotonic() + 0.2, connected):
        # as `SSLContext.wrap_socket` does
        with socket.socket(fileno=connected.detach()) as wrapped:
            wrapped.settimeout(5)
            assert wrapped.recv(1) == b""


def test_the_checked_address_is_connected(site, monkeypatch):
    """A name server that gives another address at the second question changes nothing."""
    answers = ["127.0.0.1", "127.0.0.2"]
    original = lookup({})

    def find(host, port, *arguments, **options):
        return original(answers.pop(0) if host == "pictures.example" else host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", find)
    assert get(site, "/a.png") == b"picture"
    assert answers == ["127.0.0.2"]


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "0.0.0.0", "10.0.0.1"),
        *("192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[fe80::1]", "[fc00::1]", "[fec0::1]"),
        *("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[::127.0.0.1]", "[ff02::1]", "[2001:db8::1]"),
    ],
)
def test_addresses_that_are_not_public(host, monkeypatch):
    def fetch(*arguments):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(downloads, "fetch", fetch)
    with pytest.raises(UserError, match="not in the public network|has no address"):
        content(f"http://{host}/a.png", hosts=["*"], **LIMITS)


def test_public_addresses():
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)
    for address in ("192.0.0.192", "192.88.99.1", "168.63.129.16", "3fff::1", "::ffff:0:7f00:1", "2002:a9fe:a9fe::1"):
        assert not is_public(address)


@pytest.mark.parametrize(
    ("entry", "url", "other"),
    [
        ("*.wide.example:8080", "http://a.wide.example:8080/a", "http://a.wide.example/a"),
        ("Bücher.example", "http://xn--bcher-kva.example/a", "http://bucher.example/a"),
        ("*.bücher.example:81", "http://a.bücher.example:81/a", "http://bücher.example:81/a"),
        ("a.example.:8080", "http://A.example:8080/a", "http://a.example/a"),
        ("2001:DB8:0::1", "http://[2001:db8::1]/a", "http://[2001:db8::2]/a"),
    ],
)
def test_spellings_of_allowed_hosts(entry, url, other):
    assert allowed_target(url, [entry]).path == "/a"
    with pytest.raises(UserError, match="are not allowed here"):
        allowed_target(other, [entry])


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://pictures.example/a", True),
        ("HTTP://PICTURES.example./a", True),
        ("https://pictures.example:443/a", True),
        ("https://pictures.example:8443/a", False),
        ("https://other.example:8443/a", True),
        ("https://other.example/a", False),
        ("https://x.y.wide.example/a", True),
        ("https://wide.example/a", False),
        ("https://notwide.example/a", False),
        ("https://pictures.example@evil.example/a", False),
        ("https://evil.example#@pictures.example/a", False),
        ("https://evil.example\\@pictures.example/a", False),
        ("https://evil.example/pictures.example", False),
        ("https://pictures.example.evil.example/a", False),
        ("https://user:word@pictures.example/a", False),
        ("https://pictures.example:99999/a", False),
        ("https:///a", False),
        ("https://pictures.example/a\r\nX: y", False),
        ("ftp://pictures.example/a", False),
        ("gopher://pictures.example/a", False),
    ],
)
def test_allowed_hosts(url, is_allowed):
    hosts = ["pictures.example", "other.example:8443", "*.wide.example"]
    if is_allowed:
        assert allowed_target(url, hosts).path == "/a"
    else:
        with pytest.raises(UserError):
            allowed_target(url, hosts)
