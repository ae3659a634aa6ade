"""A language model as judge of answers, over any server with the OpenAI chat interface. Off unless `--judge` is given.

OUTPUT/judge_requests.jsonl: open requests, in the format of the OpenAI batch interface
OUTPUT/judge_replies.jsonl: replies, appended as they come, or the output file of a batch
"""

import argparse
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError, counted
from mindvlm.evaluation.answers import end_last_line
from mindvlm.evaluation.benchmark import Answer

REQUESTS_FILE, REPLIES_FILE = "judge_requests.jsonl", "judge_replies.jsonl"
NUM_THREADS = 8
WAITS = (0.5, 2, 8)
TIMEOUT = 120
KEY_VARIABLE = "OPENAI_API_KEY"

Stage = Callable[[Any, Answer, Sequence[str | None]], dict[str, Any] | None]
"""Returns the body of a request for (question, answer, replies of the earlier stages), or None if none is needed."""


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge",
        metavar="URL",
        help=f"base URL of a server with the OpenAI interface, ending in /v1; its key is in {KEY_VARIABLE}. Without "
        "it, requests are written to judge_requests.jsonl",
    )
    parser.add_argument("--judge_model", metavar="NAME", default="gpt-4", help="(default %(default)s)")


def judged(
    stages: Sequence[Stage], pairs: Sequence[tuple[Any, Answer]], output: Path, options: argparse.Namespace
) -> tuple[dict[str, Answer], list[str]]:
    """Returns the answers by question id with `replies`, one for each stage that has one, and notes.

    Asks the judge for replies that are not in the file of replies, if there is a judge.

    Raises:
        UserError: the file of replies is damaged, or the judge cannot be reached. Replies so far are kept.
    """
    known = read_replies(output / REPLIES_FILE)
    replies: dict[str, list[str | None]] = {question.id: [] for question, _ in pairs}
    waiting: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages):
        open_requests: dict[str, dict[str, Any]] = {}
        for question, answer in pairs:
            if len(replies[question.id]) < number:
                continue
            body = stage(question, answer, replies[question.id])
            if body is None:
                replies[question.id].append(None)
                continue
            name, body = f"{question.id}#{number}", {"model": options.judge_model, **body}
            if (reply := reply_to(known.get(name), body)) is not None:
                replies[question.id].append(reply)
            else:
                open_requests[name] = body
        if options.judge and open_requests:
            for name, reply in ask_all(options.judge, open_requests, output / REPLIES_FILE).items():
                replies[name.rpartition("#")[0]].append(reply)
        else:
            waiting |= open_requests
    path = output / REQUESTS_FILE
    if not waiting:
        path.unlink(missing_ok=True)
        notes = []
    else:
        with atomic_file(path) as file:
            for name, body in waiting.items():
                row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        requests = counted(len(waiting), "request")
        verb = "waits" if len(waiting) == 1 else "wait"
        notes = [f"{requests} to a judge {verb} in {path}; give --judge URL, or write the replies to {REPLIES_FILE}"]
    return {question.id: {**answer, "replies": replies[question.id]} for question, answer in pairs}, notes


def read_replies(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of a file of replies by request, the later of two. Raises UserError if one is damaged."""
    if not path.exists():
        return {}
    end_last_line(path)
    entries = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            response = entry.get("response")
            content = reply_text(response["body"]) if response else entry["content"]
            entries[str(entry["custom_id"])] = {**entry, "content": content}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path}: line {number} is no reply with a custom_id; remove it") from None
    return entries


def reply_to(entry: Mapping[str, Any] | None, body: dict[str, Any]) -> str | None:
    """Returns the text of a reply, or None if there is none or it answers another request."""
    if entry is None or entry.get("digest", digest(body)) != digest(body):
        return None
    return entry["content"]


def digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def ask_all(url: str, requests: Mapping[str, dict[str, Any]], path: Path) -> dict[str, str]:
    """Sends requests, several at a time, and appends each reply to a file as it comes."""
    found: dict[str, str] = {}
    failed: UserError | None = None
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(NUM_THREADS) as pool:
        jobs = {pool.submit(ask, url, body): name for name, body in requests.items()}
        try:
            for job in as_completed(jobs):
                if job.cancelled():
                    continue
                if isinstance(error := job.exception(), UserError):
                    # replies that are under way are still kept
                    failed = failed or error
                    for other in jobs:
                        other.cancel()
                    continue
                name, reply = jobs[job], job.result()
                found[name] = reply
                entry = {"custom_id": name, "content": reply, "digest": digest(requests[name])}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise failed
    return found


def ask(url: str, body: dict[str, Any]) -> str:
    """Returns the text of a reply. Raises UserError after several attempts, or if the server refuses the request."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--judge {url}: expected a URL that begins with http:// or https://")
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return reply_text(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}"
            if error.code not in (408, 429) and error.code < 500:
                break
        except OSError as error:
            problem = str(getattr(error, "reason", error))
        except ValueError:
            problem = "a reply that is no JSON"
        except (KeyError, IndexError, TypeError):
            problem = "a reply without choices[0].message.content"
        if wait is not None:
            time.sleep(wait)
    raise UserError(
        f"--judge {url}: {problem}; replies so far are kept, the same command asks the rest when the judge is up"
    )


def reply_text(body: Any) -> str:
    """Returns the text of a chat completion. Raises KeyError, IndexError or TypeError if there is none."""
    content = body["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("content")
    return content
