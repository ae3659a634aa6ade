"""The processes of a router: their choice, their ends and new starts, and their figures. Most have no model."""

import logging
import os
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from mindvlm.core.errors import UserError
from mindvlm.serving import replica as replica_module
from mindvlm.serving.errors import ApiError
from mindvlm.serving.fleet import ServedModel
from mindvlm.serving.router import read_target
from mindvlm.serving.shares import machine_shares
from tests.serving.running import routing, wait_for

FAKE = (sys.executable, str(Path(__file__).with_name("fake_replica.py")))


@pytest.fixture
def quick_restarts(monkeypatch):
    monkeypatch.setattr(replica_module, "FIRST_DELAY_SECONDS", 0.01)


def model_of(*running: int | None) -> ServedModel:
    """A model whose replicas have so many requests under way; None: not ready."""
    replicas = [
        SimpleNamespace(number=number, num_running=count or 0, is_ready=count is not None, name="m", has_given_up=False)
        for number, count in enumerate(running)
    ]
    return ServedModel(replicas)


def test_the_replica_with_the_fewest_requests_is_chosen():
    assert {model_of(2, 1, 3).choose(key).number for key in range(20)} == {1}
    assert {model_of(None, 5, 9).choose(key).number for key in range(20)} == {1}


def test_conversations_are_spread_and_stay():
    model = model_of(1, 1, 1)
    chosen = [model.choose(key).number for key in range(100)]
    assert set(chosen) == {0, 1, 2} and chosen == [model.choose(key).number for key in range(100)]


def test_turns_of_a_conversation_have_the_same_key():
    first = b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]'
    name, key = read_target(first + b', "model": "m"}')
    assert name == "m"
    assert read_target(first[:-1] + b', {"role": "assistant", "content": "b"}]}') == (None, key)
    assert read_target(first.replace(b'"a"', b'"b"') + b"}")[1] != key


@pytest.mark.parametrize("messages", ["5", "[]", "[5]", '{"a": 1}', "null", '[{"role": []}]'])
def test_messages_of_a_wrong_type_are_left_to_the_model(messages):
    assert read_target(b'{"messages": %s}' % messages.encode())[0] is None


@pytest.mark.parametrize("body", ["[]", "5", "x", '{"model": 5}', "[" * 100_000])
def test_bodies_without_a_target(body):
    with pytest.raises(ApiError) as raised:
        read_target(body.encode())
    assert raised.value.status == 400


def test_no_replica_is_ready():
    with pytest.raises(ApiError, match="the model m is loading") as raised:
        model_of(None, None).choose(0)
    assert raised.value.status == 503 and int(raised.value.headers["Retry-After"]) > 0


def test_while_a_model_is_loading():
    with routing(["loading", "good"], command=FAKE, wait=False) as router:
        wait_for(lambda: router.post("completions", {"model": "good"}).status_code == 418)
        for refused in (
            router.request("GET", "/health"),
            router.post("completions", {"model": "loading"}),
            router.request("GET", "/v1/models/loading"),
        ):
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
            assert int(refused.headers["retry-after"]) > 0
        assert [card["id"] for card in router.request("GET", "/v1/models").json()["data"]] == ["good"]
        assert router.request("GET", "/v1/models/good").json()["id"] == "good"
        assert router.request("GET", "/v1/models/a/b").status_code == 404


def test_requests_are_passed_on_unchanged():
    with routing(["one", "two"], command=FAKE, num_replicas=2) as router:
        (mode,) = {stat.S_IMODE(os.stat(folder).st_mode) for folder in [router.fleet.folder.name]}
        assert mode == 0o700
        assert [card["id"] for card in router.request("GET", "/v1/models").json()["data"]] == ["one", "two"]
        body = b'{"model": "two",   "x": "\xc3\xa4"}'
        answer = router.post("completions", content=body, headers={"Authorization": "Bearer k", "Cookie": "c"})
        assert answer.status_code == 418 and answer.headers["retry-after"] == "7"
        asked = answer.json()
        assert asked["body"] == body.decode() and asked["path"] == "/v1/completions"
        assert not {"authorization", "cookie"} & set(asked["headers"])
        assert asked["pid"] in {replica.process.pid for replica in router.fleet.models[1].replicas}
        absent = router.post("completions", content=b"{}").json()
        assert absent["pid"] in {replica.process.pid for replica in router.fleet.models[0].replicas}
        unknown = router.post("completions", content=b'{"model": "three"}')
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
        assert "this server has 'one', 'two'" in unknown.json()["error"]["message"]
    with routing(["one", "two"], command=FAKE, any_model=True) as router:
        assert router.post("completions", content=b'{"model": "three"}').status_code == 418


def test_a_replica_that_cannot_be_reached_is_passed_over():
    with routing(["one"], command=FAKE, num_replicas=2) as router:
        for replica in router.fleet.replicas:
            os.rename(replica.path, f"{replica.path}.away")
            expected = 418 if replica.number == 0 else 503
            assert {router.post("completions", {}).status_code for _ in range(4)} == {expected}


def test_figures_are_merged():
    with routing(["one", "two"], command=FAKE, num_replicas=2) as router:
        text = router.request("GET", "/metrics").text
        lines = text.splitlines()
        assert [line for line in lines if line.startswith("# ") and "asked" in line] == [
            "# HELP asked_total requests",
            "# TYPE asked_total counter",
        ]
        assert lines.count("# TYPE seconds histogram") == 1
        assert 'asked_total{model="one",path="/a \\"b\\"",replica="1"} 2.0' in lines
        assert router.figure("seconds_bucket", le="+Inf") == 8
        assert router.figure("seconds_sum", model="two") == 7
        assert router.figure("mindvlm_replica_ready") == router.figure("mindvlm_replica_starts_total") == 4
        assert router.figure("mindvlm_router_requests_total", path="/metrics", status="200") > 0


def test_a_process_that_ends_in_a_stream(quick_restarts):
    with routing(["half"], command=FAKE) as router:
        events = router.post("chat/completions", {}).text.split("\n\n")
        assert events[0] == 'data: {"choices": []}' and events[2:] == ["data: [DONE]", ""]
        assert events[1].startswith('data: {"error":') and '"code":"replica_failed"' in events[1]
        wait_for(lambda: router.health == 200)
        assert router.figure("mindvlm_replica_starts_total") == 2


def test_a_process_that_always_ends(quick_restarts, caplog):
    with routing(["dies", "good"], command=FAKE) as router:
        for number in range(replica_module.MAX_FAILURES):
            wait_for(lambda: router.health == 200)
            answer = router.post("chat/completions", {"model": "dies"})
            assert answer.status_code == 502 and answer.json()["error"]["code"] == "replica_failed", number
        wait_for(lambda: router.fleet.replicas[0].has_given_up)
        assert router.health == 503
        refused = router.post("chat/completions", {"model": "dies"})
        assert refused.status_code == 503 and "failed too often" in refused.json()["error"]["message"]
        assert refused.headers["x-should-retry"] == "false"
        assert router.post("chat/completions", {"model": "good"}).status_code == 418
    lines = [record.message for record in caplog.records if record.name.startswith("mindvlm")]
    assert len(lines) == replica_module.MAX_FAILURES
    assert "dies, replica 0: its process ended with status 3" in lines[0] and "starts again in" in lines[0]
    assert "after 5 failures in a row it is not started again" in lines[-1]


def test_delays_between_starts_grow_and_a_long_life_forgives(monkeypatch, caplog):
    monkeypatch.setattr(replica_module, "FIRST_DELAY_SECONDS", 0.01)
    with routing(["dies"], command=FAKE) as router, caplog.at_level(logging.WARNING):
        for life in (60, 60, 0, 60):
            wait_for(lambda: router.health == 200)
            monkeypatch.setattr(replica_module, "SHORT_SECONDS", life)
            router.post("chat/completions", {})
        wait_for(lambda: router.health == 200)
    delays = [record.args[-1] for record in caplog.records if "starts again" in record.message]
    assert delays == [0.01, 0.02, 0.01, 0.02]


def test_no_process_is_left(quick_restarts):
    with pytest.raises(UserError, match="all processes have failed"):
        with routing(["dies"], command=FAKE) as router:
            for _ in range(replica_module.MAX_FAILURES):
                wait_for(lambda: router.health == 200)
                router.post("chat/completions", {})
            wait_for(lambda: not is_open(router))


def is_open(router) -> bool:
    try:
        return bool(router.health)
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["good", "problem"], "^config problem.yaml is wrong; correct it$"),
        (["gone", "good"], "its process ended with status 4 while its model was loading"),
    ],
)
def test_a_start_that_fails(paths, said):
    with pytest.raises(UserError, match=said):
        with routing(paths, command=FAKE):
            pass


def test_a_folder_whose_path_is_too_long(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(UserError, match="set TMPDIR to a folder with a short path"):
        with routing(["good"], command=FAKE):
            pass


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(replica_module, "END_SECONDS", 0.2)
    with routing(["deaf"], command=FAKE) as router:
        folder = Path(router.fleet.folder.name)
        assert folder.exists()
    assert router.fleet.replicas[0].process.returncode == -signal.SIGKILL
    assert not folder.exists()


def test_shares_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("mindvlm.serving.shares.num_threads", lambda: 7)
    shares = machine_shares(3)
    assert [share["ASCEND_RT_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "2"]
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["2"] * 3
    assert machine_shares(8)[0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4, 6,4")
    assert [share["ASCEND_RT_VISIBLE_DEVICES"] for share in machine_shares(3)] == ["4", "6", "4"]
    assert machine_shares(2)[1]["OMP_NUM_THREADS"] == "5"
    with pytest.raises(UserError, match="is 4, 6,4 for 4 processes; name a card for each"):
        machine_shares(4)
