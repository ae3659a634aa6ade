"""`mindvlm-evaluate` on benchmarks of questions with a tiny Vary: batches, kills, shares, broken pictures, judges."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import mindvlm
from mindvlm.tools import evaluate as tool
from tests.evaluation.official_folders import SHORT, write_folder
from tests.parallel.launch import start
from tests.tiny_vary import write_tiny_vary


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, and the folders of three benchmarks."""
    root = tmp_path_factory.mktemp("evaluate")
    write_tiny_vary(root / "vary")
    for name in ("pope", "scienceqa", "llava-bench-wild", "mathverse"):
        write_folder(name, root / name)
    return root


@pytest.fixture
def run(root, tmp_path, capsys, monkeypatch):
    """The tool as a function of benchmark and arguments to (status, out, err)."""
    monkeypatch.chdir(tmp_path)

    def evaluate(name: str, *argv, model=root / "vary/tiny.yaml") -> tuple[int, str, str]:
        chosen = ["--config_path", model] if model else []
        options = ["--benchmark", name, "--data", root / name, "--max_new_tokens", 4] if "--data" not in argv else []
        status = tool.main([str(argument) for argument in (*options, *chosen, *argv)])
        return status, *capsys.readouterr()

    return evaluate


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def texts(path: str | Path) -> dict:
    return {row["question_id"]: row["text"] for row in lines(path)}


def test_a_batch_equals_single_answers_in_the_form_of_the_originals(run, root):
    status, out, err = run("pope")
    assert status == 0 and "3 of 3 questions" in err and "| mean of categories" in out
    model = mindvlm.load(root / "vary/tiny.yaml")
    rows = lines("evaluation/pope/answers.jsonl")
    for row in rows:
        number = row["question_id"]
        assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert row["prompt"] == f"Is there {number}?{SHORT}"
        single = model.chat(row["prompt"], root / f"pope/val2014/{number}.jpg", max_new_tokens=4)
        assert row["text"] == str(single)
    results = json.loads(Path("evaluation/pope/results.json").read_text())
    assert results["questions"] == results["answered"] == 3 and "mindspore" in results["versions"]
    assert results["intervals"]["pope"]["mean of categories"]["accuracy"][0] <= 100
    assert " to " in Path("evaluation/pope/results.md").read_text()


def test_a_kill_at_any_byte_loses_at_most_one_answer(run):
    run("pope")
    path = Path("evaluation/pope/answers.jsonl")
    whole, expected = path.read_bytes(), texts(path)
    for size in (0, 1, len(whole) // 2, len(whole) - 40, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"}}\n") + (size == len(whole) - 1)
        status, _, err = run("pope")
        assert status == 0 and texts(path) == expected
        assert f"{complete} of 3 questions are answered" in err or not complete
        # kept answers keep their random id, and none is repeated
        assert len(lines(path)) == 3 and path.read_bytes().startswith(whole[:size][: whole[:size].rfind(b"\n") + 1])


def test_shares_are_merged_in_the_order_of_the_questions(run):
    run("pope", "--output", "whole")
    for number in (1, 0):
        status, out, err = run("pope", "--output", "parts", "--num_chunks", 2, "--chunk_idx", number)
        assert status == 0 and not out and "without --num_chunks the answers are scored" in err
    assert [row["question_id"] for row in lines("parts/2_0.jsonl")] == [0, 1]
    merged = run("pope", "--score", "parts/2_0.jsonl", "parts/2_1.jsonl", "--output", "scored", model=None)
    status, out, _ = run("pope", "--output", "parts")
    assert status == 0 and not Path("parts/2_0.jsonl").exists()
    assert [row["question_id"] for row in lines("parts/answers.jsonl")] == [0, 1, 2]
    assert texts("parts/answers.jsonl") == texts("whole/answers.jsonl") and merged[1] == out


def test_a_broken_picture_costs_its_question(run, root, tmp_path):
    data = write_folder("pope", tmp_path / "pope")
    (data / "val2014/1.jpg").write_bytes(b"no picture")
    argv = ("--benchmark", "pope", "--data", data, "--max_new_tokens", 4)
    status, out, err = run("pope", *argv)
    assert status == 1 and err.count("cannot be answered") == 1 and "1.jpg" in err
    assert "1 question of 3 has no answer and is left out, first '1'" in err
    assert "- cannot be answered: 1\n" in Path("evaluation/pope/results.md").read_text()
    (data / "val2014/1.jpg").write_bytes((data / "val2014/0.jpg").read_bytes())
    assert run("pope", *argv)[0] == 0


def answer_file(path: str, rows: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"question_id": key, "text": "B", "model_id": "m"} for key in ("0", "1", "2")]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([*ROWS, {**ROWS[0], "text": "A"}], "answers '0' again"),
        ([{**ROWS[0], "question_id": "77"}], "which is no question of --data"),
        ([{**ROWS[0], "metadata": {"benchmark": "pope"}}], "was made with benchmark 'pope', not 'scienceqa'"),
        ([{**ROWS[0], "metadata": {"settings": {"split": "val"}}}], "was made with split 'val', not 'test'"),
        ([ROWS[0], {**ROWS[1], "model_id": "other"}], "answers of m and other; give those of one model"),
        ([{"question_id": "0"}], "is no answer with a question_id"),
        ([{"question_id": "0", "text": None}], "is no answer with a question_id"),
    ],
)
def test_answers_that_are_refused(run, rows, message):
    status, _, err = run("scienceqa", "--score", answer_file("a.jsonl", rows), model=None)
    assert status == 2 and message in err and err.count("\n") == 1


def test_missing_answers_count_as_the_original_counts_them(run):
    status, out, err = run("scienceqa", "--score", answer_file("a.jsonl", ROWS[:2]), model=None)
    assert status == 1 and "1 question of 3 has no answer and counts as wrong, first '2'" in err
    assert json.loads(Path("scienceqa_result.json").read_text())["correct"] == 2
    answer_file("a.jsonl", [*ROWS, *ROWS])
    assert run("scienceqa", "--score", "a.jsonl", model=None)[0] == 0
    # with --compat the later of two answers counts, and damaged lines are left out
    answer_file("b.jsonl", [*ROWS, {**ROWS[0], "text": "A"}, {**ROWS[0], "question_id": "9"}])
    with open("b.jsonl", "a") as file:
        file.write("{broken\n")
    status, out, err = run("scienceqa", "--score", "b.jsonl", "--compat", model=None)
    assert status == 1 and "2 lines are no answers to these questions" in err
    assert json.loads(Path("scienceqa_result.json").read_text())["correct"] == 2


class Judge(BaseHTTPRequestHandler):
    """Replies with the next of `replies`; a number is an error status."""

    replies: list = []
    requests: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        reply = self.replies.pop(0) if self.replies else 503
        content = {"choices": [{"message": {"content": reply}}]} if isinstance(reply, str) else {}
        data = json.dumps(content).encode()
        self.send_response(reply if isinstance(reply, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge(monkeypatch):
    """A judge as (URL, handler), asked one request at a time."""
    monkeypatch.setattr("mindvlm.evaluation.judge.NUM_THREADS", 1)
    monkeypatch.setattr("mindvlm.evaluation.judge.WAITS", ())
    handler = type("Handler", (Judge,), {"replies": [], "requests": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()


NUMBERED = [{"question_id": key, "text": f"Text {key}."} for key in range(3)]


def test_a_judge_is_asked_only_if_it_is_given(run, judge):
    url, handler = judge
    answer_file("a.jsonl", NUMBERED)
    status, out, err = run("llava-bench-wild", "--score", "a.jsonl", model=None)
    assert status == 1 and "3 requests to a judge wait in" in err and not handler.requests
    assert "3 answers of 3 have no score: a judge has not replied" in err
    requests = lines("judge_requests.jsonl")
    assert requests[0]["custom_id"] == "0#0" and "[Context]\nA cat.\nA mat.\n\n[Question]\nWhy 0?" in str(
        requests[0]["body"]["messages"][1]["content"]
    )
    # down after the first reply: nothing is lost
    handler.replies += ["8 4"]
    status, _, err = run("llava-bench-wild", "--score", "a.jsonl", "--judge", url, model=None)
    assert status == 2 and f"--judge {url}: status 503; replies so far are kept" in err and err.count("\n") == 1
    handler.replies += ["nonsense", "10 5\nfine"]
    status, out, err = run("llava-bench-wild", "--score", "a.jsonl", "--judge", url, model=None)
    assert status == 1 and "1 answer of 3 has no score: a judge has given no usable reply" in err
    figures = json.loads(Path("results.json").read_text())["tasks"]["llava-bench-wild"]
    assert figures["all"] == {"questions": 2, "ratio": 50, "reference": 90, "model": 45}
    # replies are kept, and the original's figure counts nonsense as -1
    status, out, err = run("llava-bench-wild", "--score", "a.jsonl", "--judge", url, "--compat", model=None)
    figures = json.loads(Path("results.json").read_text())["tasks"]["llava-bench-wild"]
    assert status == 0 and figures["all"]["questions"] == 3
    assert figures["all"]["ratio"] == pytest.approx(100 * 2.667 / 5.667, abs=1e-4)
    assert [row["tuple"] for row in lines("reviews.jsonl")] == [[8, 4], [-1, -1], [10, 5]]
    # another answer needs another review
    num_requests = len(handler.requests)
    answer_file("a.jsonl", [{**NUMBERED[0], "text": "Changed."}, *NUMBERED[1:]])
    handler.replies += ["2 2"]
    run("llava-bench-wild", "--score", "a.jsonl", "--judge", url, model=None)
    assert len(handler.requests) == num_requests + 1


def test_replies_of_a_batch_interface_are_read(run):
    answer_file("a.jsonl", [{"sample_index": str(n), "text": "It is 4."} for n in (1, 2, 3)])

    def reply(name: str, content: str) -> dict:
        return {"custom_id": name, "response": {"body": {"choices": [{"message": {"content": content}}]}}}

    answer_file("judge_replies.jsonl", [reply(f"{n}#0", "Extracted Answer: 4") for n in (1, 2, 3)])
    status, _, err = run("mathverse", "--score", "a.jsonl", model=None)
    waiting = lines("judge_requests.jsonl")
    assert status == 1 and [row["custom_id"] for row in waiting] == ["1#1", "2#1", "3#1"]
    assert waiting[0]["body"]["messages"][0]["content"] == "Compare Find 1. 4 4"
    replies = [reply(f"{n}#0", "Extracted Answer: 4") for n in (1, 2, 3)]
    replies += [reply(f"{n}#1", f"Judgement: {n % 2}") for n in (1, 2, 3)]
    answer_file("judge_replies.jsonl", replies)
    assert run("mathverse", "--score", "a.jsonl", model=None)[0] == 0
    figures = json.loads(Path("results.json").read_text())["tasks"]["mathverse"]
    assert figures["all"]["accuracy"] == pytest.approx(200 / 3, abs=1e-3)
    assert figures["Vision Only"]["accuracy"] == 50
    assert not Path("judge_requests.jsonl").exists()
    Path("judge_replies.jsonl").write_text('{"custom_id": "1#0"}\n')
    status, _, err = run("mathverse", "--score", "a.jsonl", model=None)
    assert status == 2 and "line 1 is no reply with a custom_id; remove it" in err


def test_runs_lie_beside_published_figures(run):
    for name in ("a", "b"):
        run("scienceqa", "--score", answer_file("a.jsonl", ROWS), "--output", name, model=None)
    status, out, err = run("", "--compare", "a", "b", "--output", "x.png", "--data", "", model=None)
    assert status == 0 and "| m | 100 (100 to 100) |" in out and "| m (b) |" in out
    assert "| TinyLLaVA-3.1B (published) | 69.1 |" in out
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    Path("results.json").write_text("{}")
    for argv, message in (
        (("--compare", "results.json"), "is no result of mindvlm-evaluate"),
        (("--compare", "nothing"), "cannot be read"),
        (("--compare", "a", "--output", "x.txt"), "expected a name that ends in .png"),
    ):
        status, _, err = run("", *argv, "--data", "", model=None)
        assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--num_chunks", 2), "expected both"),
        (("--num_chunks", 2, "--chunk_idx", 2), "from 0 to below the first"),
        (("--num_chunks", 2, "--chunk_idx", 0, "--score", "x"), "no effect with --score"),
        (("--max_new_tokens", 0), "--max_new_tokens is 0"),
    ],
)
def test_options_that_contradict_each_other(run, argv, message):
    status, _, err = run("pope", *argv, model=None if "--score" in argv else "x.yaml")
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.ci
def test_processes_take_their_shares(run, root, tmp_path):
    run("pope", "--output", "single")
    argv = ["--benchmark", "pope", "--data", str(root / "pope"), "--max_new_tokens", "4"]
    argv += ["--config_path", str(root / "vary/tiny.yaml"), "--output", "shared"]
    job = start(Path(tool.__file__), *argv, num_processes=2, log_dir=tmp_path)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert texts("shared/answers.jsonl") == texts("single/answers.jsonl")
    assert [row["question_id"] for row in lines("shared/answers.jsonl")] == [0, 1, 2]
    assert not list(Path("shared").glob("*_*.jsonl")) and Path("shared/results.json").exists()
