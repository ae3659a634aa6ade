"""A server of a tiny model in a thread or as a command, a router of several processes, and requests for them."""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mindvlm.api import load
from mindvlm.serving.fleet import Fleet
from mindvlm.serving.listening import bind
from mindvlm.serving.plan import ModelPlan
from mindvlm.serving.router_server import RouterServer
from mindvlm.serving.server import ModelServer
from mindvlm.serving.settings import ServerSettings
from mindvlm.serving.sites import own_names
from mindvlm.tools.serve import REPLICA, named_plan
from tests.tiny_vary import picture, write_tiny_vary

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """Asks the server at a port of this machine."""

    def __init__(self, port: int):
        self.port = port
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.headers: dict[str, str] = {}

    def request(self, method: str, path: str, **options) -> httpx.Response:
        headers = self.headers | options.pop("headers", {})
        return httpx.request(method, self.root + path, timeout=60, headers=headers, **options)

    def post(self, path: str, body=None, **options) -> httpx.Response:
        # as ASCII, in which half a surrogate pair has a form
        content = {} if body is None else {"content": json.dumps(body)}
        return self.request("POST", f"/v1/{path}", **content, **options)

    def chat(self, text="read", **fields) -> httpx.Response:
        fields.setdefault("messages", [{"role": "user", "content": text}])
        return self.post("chat/completions", {"model": "tiny", "max_tokens": 4, **fields})

    def text(self, *arguments, **fields) -> str:
        answer = self.chat(*arguments, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]


class RunningServer(Client):
    """A started server of one model."""

    def __init__(self, server: ModelServer, port: int):
        super().__init__(port)
        self.server, self.scheduler = server, server.scheduler

    @property
    def service(self):
        return self.server.service

    @property
    def engine(self):
        return self.scheduler.model.engine

    def wait_until_idle(self) -> None:
        wait_for(lambda: not self.scheduler.running and not self.scheduler.waiting)


class RunningRouter(Client):
    """A started router."""

    def __init__(self, fleet: Fleet, port: int):
        super().__init__(port)
        self.fleet = fleet

    @property
    def health(self) -> int:
        return self.request("GET", "/health").status_code

    def figure(self, name: str, **labels: str) -> float:
        """Returns the sum of the samples of a name that have these labels."""
        families = text_string_to_metric_families(self.request("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def new_settings(**settings) -> ServerSettings:
    names = () if settings.get("api_keys") else own_names("127.0.0.1", settings.get("cors_origins", ()))
    return ServerSettings(own_names=names, **settings)


@contextlib.contextmanager
def running(folder: Path, *, wait: bool = True, changes: dict | None = None, **settings) -> Iterator[RunningServer]:
    """Serves a tiny Vary with random weights; without keys, foreign sites are refused as by the command."""
    path = write_tiny_vary(folder, **(changes or {}))
    listening = bind("127.0.0.1", 0)
    server = ModelServer(lambda: load(path, cache=False), new_settings(**settings), listening, close_seconds=5)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        started = RunningServer(server, listening.getsockname()[1])
        if wait:
            wait_for(lambda: httpx.get(f"{started.root}/health").status_code == 200, 60)
        yield started
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def started(path: Path, *options: str, all_cpus: bool = False, **environment: str | None):
    """A running command with its log and address.

    Args:
        all_cpus: whether it may use all, also if the workers of the tests have one each.
        environment: variables to set, or to remove with None.
    """
    command = [sys.executable, "-m", "mindvlm.tools.serve", "--config_path", str(path), "--port", "0"]
    variables = {key: value for key, value in (os.environ | environment).items() if value is not None}
    log = path.parent / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [*command, *options], stderr=errors, cwd=ROOT, env=variables, preexec_fn=use_all_cpus if all_cpus else None
        )
    try:
        wait_for(lambda: "listening on" in log.read_text(), 60)
        yield process, log, re.search(r"http://\S+", log.read_text())[0]
    finally:
        process.kill()
        process.wait()


def use_all_cpus() -> None:
    os.sched_setaffinity(0, range(os.cpu_count()))


def children_of(process: subprocess.Popen) -> list[int]:
    """Returns the processes that all threads of a process have started."""
    files = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(text) for file in files for text in file.read_text().split()]


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def routing(
    paths: Sequence[str | Path],
    *,
    command: Sequence[str] = REPLICA,
    num_replicas: int = 1,
    wait: bool = True,
    **settings,
) -> Iterator[RunningRouter]:
    """Serves models in processes of their own. An error that ends the router is raised at the end of the block.

    Args:
        command: that of `Replica`; for another one the paths are the names of the models.
    """
    limits = new_settings(**settings)
    plans = [ModelPlan(config_path=str(path), overrides={}, caches=False, settings=limits) for path in paths]
    if command is REPLICA:
        plans = [named_plan(plan) for plan in plans]
    else:
        plans = [replace(plan, settings=replace(limits, model_name=plan.config_path)) for plan in plans]
    environments = [{"OMP_NUM_THREADS": "1"}] * len(plans) * num_replicas
    fleet = Fleet(command, plans, num_replicas, environments, any_model=limits.any_model)
    listening = bind("127.0.0.1", 0)
    server = RouterServer(fleet, limits, listening, close_seconds=5)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.run)
        try:
            started = RunningRouter(fleet, listening.getsockname()[1])
            if wait:
                wait_for(lambda: ended.done() or all(replica.is_ready for replica in fleet.replicas), 120)
            yield started
        finally:
            server.stop()
        ended.result(30)
    assert all(replica.process.returncode is not None for replica in fleet.replicas if replica.process)


def data_url(seed: int = 0, size: tuple[int, int] = (40, 20), kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture(seed, size).save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def shown(seed: int, text: str = "read") -> list[dict]:
    """The messages of a question about a picture."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(seed)}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


LONG = "All of this text is the same in many prompts, and longer than a block of tokens. " * 2


def mixed_request(number: int) -> dict:
    """Requests of different lengths, pictures and options."""
    options = ({}, {"temperature": 0.9, "top_k": 5}, {"repetition_penalty": 1.3}, {"temperature": 1.2, "top_p": 0.8})
    text = f"{LONG if number % 3 else ''}question {number % 5}"
    messages = shown(number % 4, text) if number % 2 else [{"role": "user", "content": text}]
    return {
        "messages": messages,
        "max_tokens": 1 + number % 4,
        "seed": number,
        "logprobs": True,
        "top_logprobs": 2,
        **options[number % 4],
    }


def choices(answer: httpx.Response) -> list:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]
