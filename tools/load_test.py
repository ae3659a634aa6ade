"""Measure a running server on this machine: tokens per second and latencies with one client and with many.

python tools/load_test.py --url http://127.0.0.1:8000/v1 --clients 1 8 32
"""

import argparse
import base64
import http.client
import io
import itertools
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from mindvlm.core.errors import Parser, UserError
from mindvlm.tools import cli

QUERY = "Provide the ocr results of this image."
UNIQUE = "unique" * 4
"""Base64 at the end of a rendered picture, which differs in each request: the server has to decode every picture."""

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Measured:
    """One answer: seconds to its first text and to its end, and its number of tokens."""

    first_seconds: float
    seconds: float
    num_tokens: int


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status, see `cli.run`."""
    return cli.run(load_test, argv)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of a server of this machine")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="at the same time (default 1 8 32)")
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients (default 64)")
    parser.add_argument("--seconds", type=float, default=60, help="at most, for each number of clients (default 60)")
    parser.add_argument("--images", nargs="*", metavar="FILE", help="pictures (default: 64 rendered ones; none: text)")
    parser.add_argument("--query", default=QUERY, help="the question (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument("--soak", type=float, default=0, metavar="S", help="ask for S seconds with the most clients")
    parser.add_argument("--pid", type=int, help="of the server; prints how its memory grows with --soak")
    return parser.parse_args(argv)


def load_test(argv: list[str] | None) -> int:
    """Prints a line of figures for each number of clients."""
    options = parse_arguments(argv)
    if urlsplit(options.url).hostname not in LOCAL_HOSTS:
        raise UserError(f"--url {options.url}: load is put on servers of this machine only")
    for flag, value in (("requests", options.requests), ("clients", min(options.clients))):
        if value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    bodies = request_bodies(options)
    if options.soak:
        return soak(options, bodies)
    ask_all(options, bodies, 1, min(4, options.requests))
    alone = None
    for num_clients in options.clients:
        start = time.perf_counter()
        found = ask_all(options, bodies, num_clients, options.requests)
        speed = sum(one.num_tokens for one in found) / (time.perf_counter() - start)
        alone = alone or speed
        print(f"{describe(num_clients, found, speed)}, {speed / alone:.2f}x", flush=True)
    return 0


def describe(num_clients: int, found: Sequence[Measured], speed: float) -> str:
    """Returns the figures of a run as a line."""
    first, whole = ([getattr(one, key) * 1e3 for one in found] for key in ("first_seconds", "seconds"))
    percentiles = [np.percentile(values, (50, 95, 99)).round().astype(int).tolist() for values in (first, whole)]
    return (
        f"{num_clients} clients: {len(found)} answers, {speed:.0f} tokens/s, "
        f"first token {percentiles[0]} ms, answer {percentiles[1]} ms (50, 95, 99 %)"
    )


def request_bodies(options: argparse.Namespace) -> list[bytes]:
    """Returns the bodies of requests, one for each picture."""
    if options.images is None:
        from mindvlm.datagen.rendered_text import sample

        files = [png(sample(7, number, split="evaluation").image) for number in range(64)]
    else:
        files = [Path(path).read_bytes() for path in options.images]
    fields = {"max_tokens": options.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    contents: list = [options.query] if not files else []
    for file in files:
        # readers ignore what follows a picture
        url = "data:;base64," + base64.b64encode(file + bytes(-len(file) % 3)).decode() + UNIQUE
        contents.append([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": options.query}])
    return [json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode() for content in contents]


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ask_all(options: argparse.Namespace, bodies: list[bytes], num_clients: int, num_requests: int) -> list[Measured]:
    """Returns the measured answers of clients that ask one after the other.

    Raises:
        UserError: a request fails.
    """
    numbers, end = itertools.count(), time.monotonic() + options.seconds
    found: list[Measured] = []
    errors: list[Exception] = []

    def work() -> None:
        connection = http.client.HTTPConnection(urlsplit(options.url).netloc, timeout=600)
        try:
            while (number := next(numbers)) < num_requests and time.monotonic() < end and not errors:
                body = bodies[number % len(bodies)]
                if options.images is None:
                    body = body.replace(UNIQUE.encode(), base64.b64encode(os.urandom(len(UNIQUE) * 3 // 4)))
                found.append(ask(connection, urlsplit(options.url).path, body))
        except (OSError, http.client.HTTPException, UserError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise UserError(f"{options.url}: a request failed ({errors[0]}); see the log of the server")
    return found


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> Measured:
    """Asks once and reads the stream. Raises UserError for a refusal."""
    start, first, num_tokens = time.perf_counter(), None, 0
    try:
        connection.request("POST", f"{path}/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
    except ConnectionError:
        # the server closes a connection without a request for some seconds
        connection.close()
        connection.request("POST", f"{path}/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
    if response.status != 200:
        raise UserError(f"status {response.status}: {response.read().decode(errors='replace')[:200]}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise UserError(chunk["error"]["message"])
        if chunk["choices"] and chunk["choices"][0]["delta"].get("content") and first is None:
            first = time.perf_counter() - start
        if chunk.get("usage"):
            num_tokens = chunk["usage"]["completion_tokens"]
    seconds = time.perf_counter() - start
    return Measured(first or seconds, seconds, num_tokens)


def soak(options: argparse.Namespace, bodies: list[bytes]) -> int:
    """Asks for a long time and prints how the resident memory of the server grows."""
    if options.pid is None:
        raise UserError("--soak needs --pid of the server, whose memory it reads")
    end, samples, num_answers = time.monotonic() + options.soak, [], 0
    start = time.monotonic()
    while time.monotonic() < end:
        num_answers += len(ask_all(options, bodies, max(options.clients), options.requests))
        samples.append((time.monotonic() - start, resident_mib(options.pid)))
    seconds, sizes = np.array(samples[len(samples) // 4 :]).T
    slope = np.polyfit(seconds / 60, sizes, 1)[0] if len(sizes) > 1 else 0.0
    print(f"{num_answers} answers in {options.soak:.0f} s: {sizes[0]:.0f} to {sizes[-1]:.0f} MiB, {slope:+.2f} MiB/min")
    return 0


def resident_mib(pid: int) -> float:
    """Returns the resident memory of a process. Raises UserError if there is none."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        raise UserError(f"--pid {pid}: no such process; give that of mindvlm-serve") from None
    return int(fields[1]) * 4096 / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
