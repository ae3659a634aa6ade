"""The command `mindvlm-serve`: what prevents a start, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mindvlm.core.errors import UserError
from mindvlm.tools.serve import build_parser, main, read_settings
from tests.serving.running import wait_for
from tests.tiny_vary import write_tiny_vary

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
        (["--max_waiting", "-1"], "--max_waiting -1: must be 0 or more"),
        (["--max_body_mib", "inf"], "--max_body_mib inf: must be more than 0 and finite"),
        (["--max_seconds", "nan"], "--max_seconds nan: must be more than 0"),
        (["--media_path", "/nowhere"], "--media_path /nowhere: no such folder"),
        *(
            (["--picture_hosts", "a.example", host], f"--picture_hosts {host}: expected host, host:port")
            for host in ("https://a.example", "a.example/b", "me@a.example", "")
        ),
        (["--api_key_file", "/nowhere"], "--api_key_file /nowhere: cannot be read"),
        (["--api_key_file", os.devnull], "no key in it"),
    ],
)
def test_wrong_options(arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        settings_of(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port 70000: expected 0 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000"),
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
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_answer(tmp_path, number):
    path = write_tiny_vary(tmp_path, generation={"max_new_tokens": 60})
    command = [sys.executable, "-m", "mindvlm.tools.serve", "--config_path", str(path), "--port", "0", "--no_cache"]
    log = tmp_path / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stderr=errors, cwd=ROOT)
    try:
        wait_for(lambda: "listening on" in log.read_text(), 60)
        url = re.search(r"http://\S+", log.read_text())[0]
        wait_for(lambda: httpx.get(url.replace("/v1", "/health")).status_code == 200, 60)
        body = {"messages": [{"role": "user", "content": "read"}], "stream": True}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(30) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
