"""The command `mindvlm-serve`: what prevents a start, and how it ends."""

import os
import re
import signal
import socket
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from mindvlm.core.errors import UserError
from mindvlm.tools import serve, serve_replica
from mindvlm.tools.serve import build_parser, main, read_plans, read_settings
from tests.serving.running import children_of, has_ended, started, wait_for
from tests.tiny_vary import tiny_config, write_tiny_vary, write_yaml

ROOT = Path(__file__).resolve().parents[2]


def settings_of(*arguments: str):
    return read_settings(build_parser().parse_args(arguments))


def test_the_options_become_settings(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# mine\none\n\n two \n")
    keys.chmod(0o600)
    settings = settings_of(
        "--slots", "3", "--max_body_mib", "0.5", "--api_key_file", str(keys), "--media_path", str(tmp_path)
    )
    assert (settings.num_slots, settings.max_body_bytes, settings.api_keys) == (3, 2**19, ("one", "two"))
    assert settings.media_path == tmp_path and not settings.cors_origins and not settings.picture_hosts
    assert settings_of().max_waiting >= 32
    assert "localhost" in settings_of().own_names
    assert settings.own_names == settings_of("--host", "0.0.0.0").own_names == ()
    assert settings_of().reuses_prompts and not settings_of("--no_prompt_reuse").reuses_prompts


def test_a_key_file_that_others_can_read_is_warned_of(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    keys.chmod(0o640)
    with pytest.warns(UserWarning, match="other users can read the keys; chmod 600"):
        settings_of("--api_key_file", str(keys))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slots", "0"], "--slots 0: must be more than 0"),
        (["--slots", "257"], "--slots 257: at most 256; for more add --replicas"),
        (["--max_waiting", "-1"], "--max_waiting -1: must be 0 or more"),
        (["--picture_cache_mib", "nan"], "--picture_cache_mib nan: must be 0 or more"),
        (["--max_body_mib", "inf"], "--max_body_mib inf: must be more than 0 and finite"),
        (["--max_seconds", "nan"], "--max_seconds nan: must be more than 0"),
        (["--media_path", "/nowhere"], "--media_path /nowhere: no such folder"),
        *(
            (["--picture_hosts", "a.example", host], f"--picture_hosts {host}: expected host, host:port")
            for host in (
                "https://a.example",
                "a.example/b",
                "me@a.example",
                "",
                "a.example:70000",
                "a:b",
                "1::2::3",
                "a" * 64,
            )
        ),
        (["--api_key_file", "/nowhere"], "--api_key_file /nowhere: cannot be read"),
        (["--api_key_file", os.devnull], "no key in it"),
        (["--replicas", "0"], "--replicas 0: expected the number of processes of a model, at least 1"),
        (["--config_path", "a", "b", "--model_name", "c"], "--model_name c: is for one model, here are 2"),
        (
            ["--config_path", "a", "--config_path", "b", "--checkpoint", "c"],
            "--checkpoint c: is for one model",
        ),
    ],
)
def test_wrong_options(arguments, said):
    parsed = build_parser().parse_args(arguments)
    with pytest.raises(UserError, match=re.escape(said)):
        read_plans(parsed, read_settings(parsed))


def test_the_most_slots():
    assert settings_of("--slots", "256").num_slots == 256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port 70000: expected 0 to 65535"),
        (
            ["--host", "no.such.host.invalid"],
            "cannot listen on no.such.host.invalid:8000: the host name is unknown; choose another --host",
        ),
        (["--host", "a" * 64], "the host name is unknown"),
        (["--host", "192.0.2.1"], "choose another --host or --port"),
    ],
)
def test_an_address_that_cannot_be_used(arguments, said, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line and "another --port" in line


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("configs/delvm/scenes.yaml", "continues pictures and answers no questions"),
        ("configs/none.yaml", "does not exist"),
    ],
)
def test_a_model_that_cannot_be_served(path, said, capsys):
    assert main(["--config_path", str(ROOT / path), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_missing_config_of_several_is_reported_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr(serve, "bind", Mock(side_effect=AssertionError))
    assert main(["--config_path", str(ROOT / "configs/delvm/scenes.yaml"), "none.yaml"]) == 2
    assert capsys.readouterr().err == "error: config none.yaml does not exist; check the path, nothing is downloaded\n"


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        (["tiny", "changed"], {"sed": 1}, "/changed.yaml: unknown config key 'sed'; did you mean 'seed'?"),
        (["tiny", "changed"], {"checkpoint": "none.safetensors"}, "none.safetensors: no such file or folder"),
        (["tiny", "changed"], {"checkpoint": None}, "changed.yaml names no checkpoint"),
        (["tiny", "changed"], {}, "both models are named 'tiny'"),
        (["tiny", str(ROOT / "configs/delvm/scenes.yaml")], {}, "continues pictures and answers no questions"),
        (["changed", "--replicas", "2"], {"checkpoint": "none.safetensors"}, "none.safetensors: no such file"),
        (["changed"], {"checkpoint": "none.safetensors"}, "none.safetensors: no such file or folder"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_reported_before_anything_starts(options, change, said, tmp_path, capfd):
    named = {"tiny": write_tiny_vary(tmp_path), "changed": write_yaml(tmp_path, tiny_config(**change), "changed.yaml")}
    arguments = [str(named.get(option, option)) for option in options]
    assert main(["--config_path", *arguments, "--port", "0", "--no_cache"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(("number", "num_replicas"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_the_server_after_the_answer(tmp_path, number, num_replicas):
    path = write_tiny_vary(tmp_path, generation={"max_new_tokens": 60}, scope={"note": "Reads noise."})
    with started(path, "--replicas", str(num_replicas), "--no_cache") as (process, log, url):
        wait_for(lambda: httpx.get(url.replace("/v1", "/health")).status_code == 200, 60)
        if num_replicas > 1:
            wait_for(lambda: len(children_of(process)) == num_replicas)
        children = children_of(process)
        body = {"messages": [{"role": "user", "content": "read"}], "stream": True}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(30) == 0
        assert all(map(has_ended, children))
        text = log.read_text()
        assert "Traceback" not in text and "error" not in text and text.endswith("\nstopped\n")
        assert f"\ntiny{', replica 0' if num_replicas > 1 else ''} is ready\n" in text
        assert "\ntiny: Reads noise.\n" in text


@pytest.mark.parametrize("said", ["native kernels", "listening on"])
def test_ctrl_c_while_the_model_loads(tmp_path, said):
    with started(write_tiny_vary(tmp_path), "--no_cache") as (process, log, _):
        wait_for(lambda: said in log.read_text(), 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        text = log.read_text()
        assert "\nstopped\n" in text and "is ready" not in text and "interrupted" not in text


def test_ctrl_c_before_the_server_listens(monkeypatch, capsys):
    monkeypatch.setattr("mindvlm.tools.cli.import_library", Mock(side_effect=KeyboardInterrupt))
    assert main(["--port", "0"]) == 0
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(("module", "command"), [(serve, serve.serve), (serve_replica, serve_replica.main)])
def test_freed_memory_is_limited_before_mindspore_starts_threads(module, command, monkeypatch):
    class Limited(Exception):
        pass

    monkeypatch.setattr("mindvlm.tools.cli.import_library", Mock(side_effect=AssertionError))
    monkeypatch.setattr(module, "limit_freed_memory", Mock(side_effect=Limited))
    with pytest.raises(Limited):
        command(["--port", "0"])


def test_a_killed_router_leaves_no_process(tmp_path):
    with started(write_tiny_vary(tmp_path), "--replicas", "2") as (process, log, url):
        wait_for(lambda: httpx.get(url.replace("/v1", "/health")).status_code == 200, 60)
        wait_for(lambda: len(children_of(process)) == 2)
        children = children_of(process)
        process.kill()
        process.wait()
        # one serves, the other one still imports MindSpore
        wait_for(lambda: all(map(has_ended, children)), 5)
