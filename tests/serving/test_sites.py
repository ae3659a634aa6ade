"""Which requests of web pages are refused, and that clients of this machine, proxies and listed pages are not."""

import httpx
import pytest
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter
from starlette.testclient import TestClient

from mindvlm.serving.gate import new_app
from mindvlm.serving.settings import ServerSettings
from mindvlm.serving.sites import own_names

PATH = "/v1/chat/completions"


def ask(
    headers: dict[str, str], *, host: str = "127.0.0.1", origins=(), path: str = PATH, **settings
) -> httpx.Response:
    """Returns the response to a request that a page may make without asking first."""
    names = own_names(host, origins)
    limits = ServerSettings(own_names=names, cors_origins=origins, **settings)
    app = new_app(limits, Counter("asked", "requests", ["path", "status"], registry=CollectorRegistry()))
    app.add_api_route(path, lambda: Response("done"), methods=["POST"])
    with TestClient(app) as client:
        return client.post(path, headers={"Content-Type": "text/plain", **headers}, content="{}")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:8000"},
        {"Host": "LOCALHOST:8080"},
        {"Host": "localhost"},
        {"Host": "localhost.:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"},
        {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
        {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
    ],
)
def test_clients_of_this_machine(headers):
    assert ask(headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Host": "evil.example:8000"}, "the Host 'evil.example:8000' is none of localhost, 127.0.0.1, ::1;"),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, "the Host 'evil.example'"),
        ({"Host": "localhost.evil.example"}, "the Host"),
        ({"Host": "evil.example@localhost@evil.example"}, "the Host"),
        ({"Host": "[::1"}, "the Host"),
        ({"Host": ""}, "the Host"),
        ({"Host": "127.0.0.1:8000", "Origin": "http://evil.example"}, "web pages of 'http://evil.example' may not ask"),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:3000"}, "web pages of"),
        ({"Host": "127.0.0.1:8000", "Origin": "null"}, "web pages of 'null'"),
    ],
)
def test_foreign_sites(headers, said):
    answer = ask(headers)
    error = answer.json()["error"]
    assert answer.status_code == 403 and error["code"] == "foreign_site" and error["type"] == "permission_error"
    assert error["message"].startswith(said) and "--cors_origins" in error["message"]
    assert ask(headers, path="/health").status_code == 200


def test_listed_origins():
    page = {"Host": "localhost:8000", "Origin": "http://page.example:3000"}
    proxied = {"Host": "page.example", "Origin": "http://page.example:3000"}
    for headers in (page, proxied):
        assert ask(headers).status_code == 403
        answer = ask(headers, origins=("http://page.example:3000",))
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://page.example:3000"
    assert ask(page | {"Origin": "http://other.example"}, origins=("http://page.example:3000",)).status_code == 403
    assert ask(page, origins=("*",)).status_code == 200


def test_names_of_the_host():
    assert own_names("localhost", ()) and own_names("::1", ())
    assert ask({"Host": "127.0.0.2:80"}, host="127.0.0.2").status_code == 200
    # others reach these
    assert own_names("0.0.0.0", ()) == own_names("192.0.2.1", ()) == own_names("no.such.host.invalid", ()) == ()
    assert ask({"Host": "any", "Origin": "https://page.example"}, host="0.0.0.0").status_code == 200
