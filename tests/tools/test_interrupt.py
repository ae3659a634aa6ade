"""Ctrl-C in `mindvlm-predict` as a process, once MindSpore has put its own handler in Python's place."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

SLOW = """
import sys, time
from mindvlm.generation.engine import Engine
step = Engine.step
Engine.step = lambda self: time.sleep(0.05) or step(self)
from mindvlm.tools import predict_llm
sys.exit(predict_llm.main(sys.argv[1:]))
"""
TIMEOUT = 60


class Terminal:
    """A process on its own terminal, and its output."""

    def __init__(self, *argv):
        self.end, inner = pty.openpty()
        command = [sys.executable, "-c", SLOW, *map(str, argv)]
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)
        self.text = ""

    def wait_for(self, text: str) -> str:
        """Reads up to a text, and returns what was in front of it."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.text:
            readable, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"no {text!r} in {self.text!r}"
            self.text += os.read(self.end, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(text)
        return before

    def type(self, line: str) -> None:
        os.write(self.end, f"{line}\n".encode())

    def press_ctrl_c(self) -> None:
        # what comes between a prompt and the reading that follows it is lost in Python itself
        time.sleep(0.3)
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(folder):
    opened = []

    def start(*argv):
        opened.append(Terminal("--config_path", folder / "tiny.yaml", "--mode", "graph", *argv))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.end)


def test_the_chat_goes_on(terminal):
    chat = terminal("--chat_mode", "--max_new_tokens", 200)
    chat.wait_for("> ")
    chat.type("read")
    chat.wait_for("compiling the decode graph (once per shape)\r\n")
    # while it compiles
    chat.process.send_signal(signal.SIGINT)
    assert "ERROR" not in chat.wait_for("[stopped]") and "Traceback" not in chat.wait_for("> ")
    chat.type("and now")
    # one of its first tokens
    chat.wait_for("and now\r\n")
    time.sleep(2)
    chat.press_ctrl_c()
    chat.wait_for("[stopped]")
    chat.wait_for("> ")
    chat.press_ctrl_c()
    chat.wait_for("/exit leaves")
    chat.wait_for("> ")
    chat.type("/exit")
    assert chat.process.wait(TIMEOUT) == 0


def test_rows_that_are_finished_are_kept(terminal, images, tmp_path):
    (images / "b.png").unlink()
    output = tmp_path / "out.jsonl"
    reading = terminal("--image_dir", images, "--output", output, "--max_new_tokens", 60)
    reading.wait_for("a.png: ")
    reading.press_ctrl_c()
    assert "Traceback" not in reading.wait_for("interrupted\r\n")
    assert reading.process.wait(TIMEOUT) == 130
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["image"].endswith("a.png") and row["num_new_tokens"] == 60


IMPORTING = """
import sys, os, signal, threading, time

def press():
    while "mindspore" not in sys.modules:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=press, daemon=True).start()
from mindvlm.tools import predict_llm
sys.exit(predict_llm.main(["--query", "hello"]))
"""


def test_while_mindspore_is_imported():
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
