"""Documents on the command line: pages, folders, URLs, files that grow with the answers, and what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mindvlm.core.config import Scope
from mindvlm.core.errors import UserError
from mindvlm.processing.images import documents
from mindvlm.processing.images.documents import DEFAULT_QUERY
from mindvlm.tools import answer_log, read_pages, sources
from mindvlm.tools.answer_log import AnswerLog
from tests.processing.images.test_documents import bare_pdf, write_pages
from tests.tiny_vary import picture, tiny_model
from tests.tools.refusals import assert_refused

pytest.importorskip("pypdfium2")
SHORT = ("--max_new_tokens", "2")


def json_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(path, pages=None, **options) -> list[str]:
    """The answers of the Python interface."""
    return [str(page.text) for page in tiny_model().read_document(path, pages, max_new_tokens=2, **options)]


@pytest.fixture
def scan(tmp_path):
    """A document of three pages."""
    path = tmp_path / "scan.pdf"
    write_pages(path, [picture(number) for number in range(3)])
    return path


def test_pages_are_read_in_order(loaded, run, scan, tmp_path):
    answers = read(scan)
    status, out, err = run("--image_dir", scan, *SHORT)
    assert (status, err) == (0, "")
    assert out == "".join(f"{scan}, page {number}: {text}\n" for number, text in enumerate(answers, 1))
    # one page is streamed
    status, out, err = run("--image_dir", scan, "--pages", "2", *SHORT)
    assert (status, out) == (0, f"{answers[1]}\n") and "2 new (max_new_tokens)" in err
    output = tmp_path / "out.jsonl"
    assert run("--image_dir", scan, "--pages", "2-9,1", "--output", output, *SHORT)[0] == 0
    records = [(record["image"], record["page"], record["text"]) for record in json_lines(output)]
    assert records == [(str(scan), number, answers[number - 1]) for number in (2, 3, 1)]


def test_what_the_model_is_for_is_said_before_pages_are_read(loaded, run, scan, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model().config, "scope", Scope(note="Reads noise."))
    command = ["--image_dir", scan, "--output", tmp_path / "out.jsonl", *SHORT]
    assert run(*command)[2] == "tiny: Reads noise.\n" and "noise" not in run(*command)[2]


def test_the_resolution_reaches_the_page(loaded, run, scan):
    expected = run("--image_dir", scan, "--pages", "1", "--dpi", "50", "--max_new_tokens", 9)[1]
    (page,) = tiny_model().read_document(scan, "1", dpi=50, max_new_tokens=9)
    assert expected == f"{page.text}\n"


def test_a_batch_answers_as_one_by_one(loaded, run, scan, images, tmp_path):
    outputs = [tmp_path / f"{size}.jsonl" for size in (1, 3)]
    for size, output in zip((1, 3), outputs, strict=True):
        command = ["--image_dir", scan, images, "--output", output, "--batch_size", size, "--do_sample", "--seed", 5]
        assert run(*command, "--max_new_tokens", 6)[0] == 1
    single, together = (
        [{**record, "seconds": 0, "tokens_per_second": 0, "time": 0} for record in json_lines(o)] for o in outputs
    )
    assert single == together and len(single) == 6
    for size in (0, 17):
        assert_refused(run("--image_dir", scan, "--batch_size", size), f"--batch_size is {size}; expected 1 to 16")


def test_a_folder_with_documents(loaded, run, images, tmp_path):
    write_pages(images / "d.pdf", [picture(0), picture(1)])
    write_pages(images / "e.tif", [picture(0), picture(1)])
    (images / "f.pdf").write_bytes(b"%PDF-1.7 and nothing else")
    (images / "g.docx").touch()
    (images / "more").mkdir()
    write_pages(images / "more" / "h.PDF", [picture(2)])
    output = tmp_path / "out.jsonl"
    status, _, err = run("--image_dir", images, "--output", output, *SHORT)
    found = [(os.path.basename(record["image"]), record.get("page"), "text" in record) for record in json_lines(output)]
    assert status == 1 and found == [
        ("a.png", None, True), ("b.png", None, False), ("c.JPG", None, True), ("d.pdf", 1, True), ("d.pdf", 2, True),
        ("e.tif", 1, True), ("e.tif", 2, True), ("f.pdf", None, False),
    ]  # fmt: skip
    assert "left out g.docx;" in err and "left out more/; add --recursive" in err and "2 of 8 pages failed" in err
    status, _, err = run("--image_dir", images, "--output", output, "--recursive", *SHORT)
    assert "6 of 9 pages are answered" in err and "more/" not in err and status == 1
    assert json_lines(output)[-1]["image"] == str(images / "more" / "h.PDF")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    assert_refused(run("--image_dir", tmp_path / "outer"), "holds no pictures but inner/", "add --recursive")


def test_what_a_search_leaves_out_is_named(loaded, run, images, tmp_path, monkeypatch):
    (tmp_path / "linked").mkdir()
    picture(3).save(tmp_path / "linked" / "z.png")
    (images / "link").symlink_to(tmp_path / "linked")
    (images / "closed").mkdir()
    (images / "a_file").symlink_to(images / "a.png")
    is_file = Path.is_file

    def refused(path):
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    (images / "closed" / "a.png").touch()
    (images / "closed" / "b.png").touch()
    status, out, err = run("--image_dir", images, "--recursive", *SHORT)
    assert status == 1 and out.count("pages/") == 2 and "z.png" not in out
    assert f"{images}: left out link/; give them as well (links to folders are not followed)" in err
    assert err.count("Permission denied") == 1
    assert f"{images / 'closed'}: left out, it cannot be searched (Permission denied); check its permissions" in err
    err = run("--image_dir", images, *SHORT)[2]
    assert "left out closed/; add --recursive" in err and "left out link/; give them as well" in err
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "link").symlink_to(images)
    assert_refused(run("--image_dir", tmp_path / "outer"), "holds no pictures but link/", "; give them as well (links")


def test_files_with_other_endings_are_named(loaded, run, tmp_path):
    for name in ("a.png", "b.PNG"):
        picture(0).save(tmp_path / name)
    for name in ("k.docx", "c.txt", ".hidden", "pages.jsonl"):
        (tmp_path / name).touch()
    status, _, err = run("--image_dir", tmp_path, *SHORT)
    assert status == 0 and err.count("left out") == 2 and "left out k.docx; convert" in err
    assert f"{tmp_path}: left out c.txt, pages.jsonl; their endings" in err
    for number in range(5):
        (tmp_path / f"{number}.txt").touch()
    err = run("--image_dir", tmp_path, *SHORT)[2]
    assert "left out 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, and 2 other files; their endings" in err


def test_a_page_that_fails_costs_itself(loaded, run, scan, tmp_path):
    output = tmp_path / "out.jsonl"
    status, _, err = run("--image_dir", scan, "--pages", "1,7,3", "--output", output, *SHORT)
    assert status == 1 and ["error" in record for record in json_lines(output)] == [False, True, False]
    assert f"error: {scan}: has 3 pages, no page 7; correct the pages" in err and "1 of 3 pages failed" in err
    assert_refused(run("--image_dir", scan, "--pages", "7"), "has 3 pages, no page 7")
    assert_refused(run("--image_dir", scan, "--pages", "5-2"), "5-2 ends before it begins; give 2-5")
    assert_refused(run("--image_dir", scan, "--dpi", "0"), "dpi is 0; expected 10 to 1200")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 and nothing else")
    assert_refused(run("--image_dir", tmp_path / "bad.pdf"), "bad.pdf: damaged")


def test_pages_of_a_conversation_and_of_one_question(loaded, run, scan, tmp_path, monkeypatch):
    query, output = "<image> or <image>?", tmp_path / "out.jsonl"
    assert run("--image_dir", scan, "--pages", "1-2", "--query", query, "--output", output, *SHORT)[0] == 0
    (record,) = json_lines(output)
    assert (record["image"], record["page"]) == ([str(scan)] * 2, [1, 2])
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert run("--image_dir", scan, "--chat_mode", "--pages", "1")[0] == 0
    assert_refused(run("--image_dir", scan, "--query", query, "--output_dir", tmp_path / "x"), "--output_dir writes a")


class TestGoingOn:
    """A log file is continued; see `mindvlm.tools.answer_log`."""

    @pytest.fixture
    def log(self, loaded, run, scan, tmp_path):
        output = tmp_path / "out.jsonl"
        assert run("--image_dir", scan, "--output", output, *SHORT)[0] == 0
        return output

    def test_a_changed_file_that_a_url_names(self, loaded, run, images, tmp_path):
        output, path = tmp_path / "out.jsonl", images / "a.png"
        command = ["--image_dir", path.as_uri(), images / "c.JPG", "--output", output, *SHORT]
        assert run(*command)[0] == 0 and "2 of 2 pages" in run(*command)[2]
        assert json_lines(output)[0]["file"]["bytes"] == path.stat().st_size
        picture(2).save(path)
        os.utime(path, (1, 1))
        assert "1 of 2 pages" in run(*command)[2]

    def test_a_document_that_is_named_in_another_way(self, log, run, scan, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "link.pdf").symlink_to(scan)
        content = log.read_bytes()
        monkeypatch.chdir(tmp_path / "elsewhere")
        for name in ("../scan.pdf", "link.pdf", scan.as_uri()):
            status, out, err = run("--image_dir", name, "--output", log, *SHORT)
            assert (status, out, err) == (0, "", f"{log}: 3 of 3 pages are answered\n") and log.read_bytes() == content
        # a run that was interrupted, with names that hold in one folder alone
        log.write_bytes(content.partition(b"\n")[0] + b"\n")
        command = ["--output", log, *SHORT, "--image_dir"]
        assert "1 of 2 pages" in run(*command, "link.pdf", "--pages", "1-2")[2]
        monkeypatch.chdir(tmp_path)
        assert "2 of 3 pages" in run(*command, "scan.pdf")[2]
        names = [(record["image"], record["page"], record["path"]) for record in json_lines(log)]
        assert names == [(name, page, str(scan)) for page, name in enumerate((str(scan), "link.pdf", "scan.pdf"), 1)]
        # another document that now has the name
        (tmp_path / "elsewhere" / "link.pdf").unlink()
        write_pages(tmp_path / "elsewhere" / "link.pdf", [picture(4)])
        assert "answered" not in run(*command, tmp_path / "elsewhere" / "link.pdf")[2] and len(json_lines(log)) == 4

    def test_documents_that_were_moved_with_the_answers(self, loaded, run, scan, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        command = ["--image_dir", "scan.pdf", "--output", "out.jsonl", *SHORT]
        assert run(*command)[0] == 0
        (tmp_path / "new").mkdir()
        for name in ("scan.pdf", "out.jsonl"):
            (tmp_path / name).rename(tmp_path / "new" / name)
        monkeypatch.chdir(tmp_path / "new")
        assert run(*command) == (0, "", "out.jsonl: 3 of 3 pages are answered\n")

    def test_a_complete_one_is_left_alone(self, log, run, scan):
        content = log.read_bytes()
        status, out, err = run("--image_dir", scan, "--output", log, *SHORT)
        assert (status, out, err) == (0, "", f"{log}: 3 of 3 pages are answered\n") and log.read_bytes() == content

    @pytest.mark.parametrize("rest", [b"", b'{"image": "', b'{"image": "\xe4'])
    def test_lines_that_are_missing_or_unfinished(self, log, run, scan, rest):
        content = log.read_bytes()
        first = content.partition(b"\n")[0] + b"\n"
        log.write_bytes(first + rest)
        status, out, err = run("--image_dir", scan, "--output", log, *SHORT)
        assert (status, err) == (0, f"{log}: 1 of 3 pages are answered\n")
        assert log.read_bytes().startswith(first) and out.count(f"{scan}, page") == 2 and "page 1:" not in out
        assert [record["page"] for record in json_lines(log)] == [1, 2, 3]

    def test_a_last_line_without_its_end(self, log, run, scan):
        log.write_bytes(log.read_bytes()[:-1])
        assert "3 of 3 pages" in run("--image_dir", scan, "--output", log, *SHORT)[2]
        log.write_bytes(log.read_bytes().partition(b"\n")[0])
        assert "1 of 3 pages" in run("--image_dir", scan, "--output", log, *SHORT)[2]
        assert [record["page"] for record in json_lines(log)] == [1, 2, 3]

    def test_failed_pages_and_changed_files_are_asked_about_again(self, log, run, scan, images):
        command = ["--image_dir", scan, images / "a.png", images / "b.png", "--output", log, *SHORT]
        assert run(*command)[0] == 1
        picture(1).save(images / "b.png")
        picture(2).save(images / "a.png")
        os.utime(images / "a.png", (1, 1))
        status, out, err = run(*command)
        assert status == 0 and "3 of 5 pages" in err and out.count("a.png: ") == out.count("b.png: ") == 1
        records = json_lines(log)
        assert [os.path.basename(record["image"]) for record in records] == ["scan.pdf"] * 3 + ["a.png", "b.png"]
        assert records[3]["text"] == str(tiny_model().chat(DEFAULT_QUERY, picture(2), max_new_tokens=2))

    def test_lines_about_other_pages_are_kept(self, log, run, scan, images):
        content = log.read_bytes()
        assert run("--image_dir", images / "c.JPG", "--output", log, *SHORT)[0] == 0
        scan.unlink()
        assert run("--image_dir", images / "c.JPG", "--output", log, *SHORT)[0] == 0
        assert log.read_bytes().startswith(content) and len(json_lines(log)) == 4

    @pytest.mark.parametrize(
        "changed, expected",
        [
            (["--query", "What?"], f"query {DEFAULT_QUERY!r}, not 'What?'"),
            (["--max_new_tokens", "3"], "max_new_tokens 2, not 3"),
            (["--do_sample"], "do_sample 'default', not True"),
            (["--dpi", "100"], "dpi 'default', not 100"),
        ],
    )
    def test_other_settings_are_refused(self, log, run, scan, changed, expected):
        content = log.read_bytes()
        command = ["--image_dir", scan, "--output", log, *SHORT, *changed]
        assert_refused(run(*command), f"out.jsonl: line 1 was made with {expected}; choose another output")
        assert log.read_bytes() == content

    def test_another_model_is_refused(self, log, run, scan, monkeypatch):
        monkeypatch.setattr("mindvlm.tools.read_pages.identity", lambda config, family: "tiny@1")
        assert_refused(run("--image_dir", scan, "--output", log, *SHORT), "was made with model 'tiny@0', not 'tiny@1'")

    @pytest.mark.parametrize("content", [b"notes\n", b"[1]\n", b'{"a": 1}\n', b'{"image": 1\n{}\n'])
    def test_another_file_is_refused(self, loaded, run, scan, tmp_path, content):
        (tmp_path / "notes").write_bytes(content)
        assert_refused(run("--image_dir", scan, "--output", tmp_path / "notes"), "notes: line 1 is no answer of")
        assert (tmp_path / "notes").read_bytes() == content

    def test_a_second_process_is_refused(self, loaded, run, scan, tmp_path, monkeypatch):
        """Also after the file was replaced, and as long as the first process runs."""
        output, original, refused = tmp_path / "out.jsonl", AnswerLog.append, []

        def append(log, record):
            original(log, record)
            log.write([record for _, record in log.lines()])
            refused.append(subprocess.run(command, capture_output=True, text=True, timeout=60))

        program = (
            f"from mindvlm.tools.answer_log import AnswerLog; AnswerLog({str(output)!r}, {{}}, [], is_writer=True)"
        )
        command = [sys.executable, "-c", program]
        monkeypatch.setattr(AnswerLog, "append", append)
        assert run("--image_dir", scan, "--output", output, *SHORT)[0] == 0
        assert len(refused) == 3 and len(json_lines(output)) == 3
        for process in refused:
            assert f"{output}: another process writes it; wait for it or choose another output" in process.stderr
        assert subprocess.run(command, timeout=60).returncode == 0
        assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "scan.pdf"]

    def test_no_file_without_an_answer(self, loaded, run, scan, tmp_path):
        output = tmp_path / "out.jsonl"
        assert_refused(run("--image_dir", scan, "--pages", "7", "--output", output), "no page 7")
        assert not output.exists()

    def test_a_full_disk(self, loaded, run, scan, tmp_path, monkeypatch):
        output, sync, calls = tmp_path / "out.jsonl", os.fsync, []

        def full(file):
            calls.append(file)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            sync(file)

        monkeypatch.setattr(answer_log.os, "fsync", full)
        status, _, err = run("--image_dir", scan, "--output", output, *SHORT)
        assert status == 2 and err == (
            f"error: {output}: cannot be written (No space left on device); make room, and the same command goes on\n"
        )
        status, _, err = run("--image_dir", scan, "--output", output, *SHORT)
        assert status == 0 and "of 3 pages are answered" in err
        assert [record["page"] for record in json_lines(output)] == [1, 2, 3]


class TestTexts:
    """`--output_dir`; see `mindvlm.tools.text_files`."""

    def test_a_file_for_each_document(self, loaded, run, scan, images, tmp_path):
        texts = read(scan)
        (images / "more").mkdir()
        picture(0).save(images / "more" / "a.png")
        # a document that is named twice is one document
        command = [
            "--image_dir",
            scan,
            images,
            images / "a.png",
            "--recursive",
            "--output_dir",
            tmp_path / "new" / "out",
            *SHORT,
        ]
        status, _, err = run(*command, "--batch_size", 3)
        out = tmp_path / "new" / "out"
        found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        assert status == 1 and found == ["a.txt", "c.txt", "more/a.txt", "pages.jsonl", "scan.txt"]
        assert (out / "scan.txt").read_text() == "\n\f".join(texts) + "\n"
        assert f"{out / 'b.txt'}: not written, because no page of {images / 'b.png'} was answered" in err
        # again: nothing is asked but the broken picture, and the other format is written
        (out / "a.txt").unlink()
        status, printed, err = run(*command, "--text_format", "md")
        assert (status, printed) == (1, "") and "7 of 8 pages are answered" in err and not (out / "a.txt").exists()
        marked = "\n".join(f"<!-- page {number} -->\n\n{text}\n" for number, text in enumerate(texts, 1))
        assert (out / "scan.md").read_text() == marked

    @pytest.mark.parametrize("lag", [0, 3600], ids=["same clock", "clock of the folder lags"])
    def test_a_text_holds_the_answers_of_all_runs(self, loaded, run, scan, images, tmp_path, lag):
        texts, text = read(scan), tmp_path / "out" / "scan.txt"
        command = ["--image_dir", scan, "--output_dir", tmp_path / "out", *SHORT]
        assert run(*command, "--pages", "2-3")[0] == run(*command, "--pages", "1")[0] == 0
        assert text.read_text() == "\n\f".join(texts) + "\n"
        # a correction stays until a page of the document is answered, also if another document or no page is
        text.write_text("corrected")
        os.utime(text, (time.time() - lag,) * 2)
        assert run(*command, "--pages", "1,9")[0] == 1
        assert run(*command, "--image_dir", scan, images / "a.png")[0] == 0
        assert text.read_text() == "corrected"
        # answers about an earlier content of the file are left out
        write_pages(scan, [picture(number) for number in (4, 3)])
        assert run(*command, "--pages", "2")[0] == 0
        assert text.read_text() == read(scan, "2")[0] + "\n"

    def test_a_document_that_is_given_under_two_names(self, loaded, run, scan, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run("--image_dir", "scan.pdf", scan, "--output_dir", tmp_path / "out", *SHORT)[0] == 0
        assert (tmp_path / "out" / "scan.txt").read_text() == "\n\f".join(read(scan)) + "\n"

    def test_a_text_that_is_older_than_an_answer_of_a_killed_run(self, loaded, run, scan, tmp_path, monkeypatch):
        text, append = tmp_path / "out" / "scan.txt", AnswerLog.append
        command = ["--image_dir", scan, "--output_dir", tmp_path / "out", *SHORT]

        def killed(log, record):
            append(log, record)
            raise KeyboardInterrupt

        assert run(*command, "--pages", "1")[0] == 0
        with monkeypatch.context() as patch:
            patch.setattr(AnswerLog, "append", killed)
            assert run(*command, "--pages", "2-3")[0] == 130
        assert "\f" not in text.read_text()
        status, out, err = run(*command, "--pages", "1-2")
        assert (status, out) == (0, "") and "2 of 2 pages are answered" in err
        assert text.read_text() == "\n\f".join(read(scan, "1-2")) + "\n"
        assert text.stat().st_mtime == max(record["time"] for record in json_lines(text.parent / "pages.jsonl"))

    @pytest.mark.parametrize(
        "changes", [{"time": value} for value in ("now", None, [], -1, 1e300, float("nan"))] + [{"page": [1]}], ids=str
    )
    def test_lines_that_were_edited(self, loaded, run, scan, tmp_path, changes):
        log, text = tmp_path / "out" / "pages.jsonl", tmp_path / "out" / "scan.txt"
        command = ["--image_dir", scan, "--pages", "1-2", "--output_dir", tmp_path / "out", *SHORT]
        assert run(*command)[0] == 0
        first, second = json_lines(log)
        log.write_text(f"{json.dumps({**first, **changes})}\n{json.dumps(second)}\n")
        text.unlink()
        assert run(*command)[0] == 0 and text.read_text() == "\n\f".join(read(scan, "1-2")) + "\n"

    def test_lines_about_several_pages_are_left_out(self, loaded, run, scan, tmp_path):
        log, text = tmp_path / "out" / "pages.jsonl", tmp_path / "out" / "scan.txt"
        command = ["--image_dir", scan, "--pages", "1", "--output_dir", tmp_path / "out", *SHORT]
        assert run(*command)[0] == 0
        (one,) = json_lines(log)
        joint = {key: [one[key], one[key]] for key in ("image", "page", "path", "file")}
        log.write_text(f"{json.dumps({**one, **joint})}\n{json.dumps(one)}\n")
        text.unlink()
        assert run(*command)[0] == 0 and text.read_text() == read(scan, "1")[0] + "\n"

    def test_a_picture_is_the_same_with_and_without_its_page(self, loaded, run, images, tmp_path):
        command = ["--image_dir", images / "a.png", "--output_dir", tmp_path / "out", *SHORT]
        assert run(*command, "--pages", "1")[0] == 0 and run(*command)[1] == ""
        assert "\f" not in (tmp_path / "out" / "a.txt").read_text()

    def test_a_failed_page_of_an_answered_document(self, loaded, run, scan, tmp_path):
        status, _, err = run("--image_dir", scan, "--pages", "1,7", "--output_dir", tmp_path / "out", *SHORT)
        assert status == 1 and "not written" not in err
        answer, error = (tmp_path / "out" / "scan.txt").read_text().split("\f")
        assert answer and re.fullmatch(r"\[.*no page 7; correct the pages\]\n", error)

    def test_a_full_disk(self, loaded, run, scan, tmp_path, monkeypatch):
        sync, calls, out = os.fsync, [], tmp_path / "out"

        def full(file):
            calls.append(file)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            sync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            status, _, err = run("--image_dir", scan, "--output_dir", out, *SHORT)
        assert status == 2 and err == (
            f"error: {out / 'scan.txt'}: cannot be written (No space left on device); "
            "make room, and the same command goes on\n"
        )
        # the last page is asked about again, so that its text is written
        assert len(json_lines(out / "pages.jsonl")) == 2 and not (out / "scan.txt").exists()
        assert "2 of 3 pages are answered" in run("--image_dir", scan, "--output_dir", out, *SHORT)[2]
        assert (out / "scan.txt").exists()
        (out / "scan.txt").unlink()
        (out / "more").touch()
        (tmp_path / "in" / "more").mkdir(parents=True)
        picture(0).save(tmp_path / "in" / "more" / "a.png")
        status, _, err = run("--image_dir", tmp_path / "in", "--recursive", "--output_dir", out, *SHORT)
        assert status == 2 and f"error: {out / 'more' / 'a.txt'}: cannot be written (File exists); make room" in err

    def test_documents_of_one_name(self, loaded, run, images, tmp_path):
        picture(0).save(images / "c.png")
        run("--image_dir", images, "--output_dir", tmp_path / "out", *SHORT)
        assert sorted(path.name for path in (tmp_path / "out").glob("c*")) == ["c.JPG.txt", "c.png.txt"]
        (tmp_path / "other").mkdir()
        picture(0).save(tmp_path / "other" / "c.png")
        command = ["--image_dir", images / "c.png", tmp_path / "other", "--output_dir", tmp_path / "out2", *SHORT]
        assert_refused(run(*command), "two documents would be written to", "c.png.txt; read them one after the other")

    def test_a_folder_that_cannot_be_written(self, loaded, run, scan, tmp_path):
        (tmp_path / "file").touch()
        command = ["--image_dir", scan, "--output_dir"]
        assert_refused(run(*command, tmp_path / "file"), "--output_dir", "cannot be created")
        assert_refused(run("--query", "hi", "--output_dir", tmp_path / "out"), "--output_dir writes a text per")
        assert_refused(run(*command, tmp_path / "out", "--chat_mode"), "--output_dir has no effect with --chat_mode")


def test_answers_that_loop_are_listed(loaded, run, scan, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.processor), "stop_ids", ())
    monkeypatch.setattr(model.engine.sampler, "choose", lambda logits, running: [7] * len(model.engine.slots))
    status, out, err = run("--image_dir", scan, "--max_repeated_tokens", "20", "--max_new_tokens", "30")
    assert (status, err) == (0, f"3 answers ended in a loop: {'; '.join(f'{scan}, page {n}' for n in (1, 2, 3))}\n")
    # an answer that reached its limit while it repeated itself
    command = ["--image_dir", scan, "--max_repeated_tokens", "0", "--max_new_tokens", "25"]
    assert run(*command)[2] == ""
    monkeypatch.setattr(read_pages, "NUM_TOKENS_OF_LOOP", 24)
    assert "3 answers ended in a loop" in run(*command)[2]


def test_pages_end_sooner_in_loops_than_other_answers():
    model = tiny_model()
    assert model.page_options({})["max_repeated_tokens"] == 700 and model.page_options({"seed": 1})["seed"] == 1
    assert model.page_options({"max_repeated_tokens": 0}) == {"max_repeated_tokens": 0}


def test_read_document(scan):
    model = tiny_model()
    pages = list(model.read_document(scan, max_new_tokens=3))
    assert [(page.number, page.stop_reason, page.error) for page in pages] == [
        (number, "max_new_tokens", None) for number in (1, 2, 3)
    ]
    together = list(model.read_document(scan.read_bytes(), [3, 1, 9], num_slots=3, max_new_tokens=3))
    assert [page.number for page in together] == [3, 1, 9] and together[:2] == [pages[2], pages[0]]
    assert (together[2].text, together[2].stop_reason) == ("", "error") and "no page 9" in str(together[2].error)
    (one,) = model.read_document(scan, "2", query="What is this?", max_new_tokens=3)
    assert one.text.history[0][0].endswith("What is this?")
    # wrong arguments are refused by the call
    for arguments in ({"pages": "2-1"}, {"dpi": 1}, {"top_k": -1}, {"max_new_token": 3}):
        with pytest.raises(UserError):
            model.read_document(scan, **arguments)
    with pytest.raises(UserError, match="damaged"):
        model.read_document(b"%PDF-1.7 and nothing else")


class Answers(BaseHTTPRequestHandler):
    content = b""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path.startswith("/scan.pdf"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.content)
        else:
            self.send_error(404)

    def log_message(self, *arguments):
        pass


def test_urls(loaded, run, scan, tmp_path):
    Answers.content = scan.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    try:
        url = f"{site}/scan.pdf?version=2"
        assert_refused(run("--image_dir", url), f"{url}: a URL; download it first and give the file, or add --allow_")
        command = ["--allow_urls", "--output_dir", tmp_path / "out", *SHORT, "--image_dir"]
        status, out, err = run(*command, url)
        assert (status, err) == (0, "")
        assert out == "".join(f"{url}, page {number}: {text}\n" for number, text in enumerate(read(scan), 1))
        assert json_lines(tmp_path / "out" / "pages.jsonl")[2]["image"] == url and (tmp_path / "out/scan.txt").exists()
        assert "3 of 3 pages are answered" in run(*command, url)[2]
        assert run("--allow_urls", *SHORT, "--image_dir", f"{site}/to/{site}/scan.pdf")[0] == 0
        assert_refused(run("--allow_urls", "--image_dir", f"{site}/none.png"), "none.png: the server answers 404")
        refused = run("--allow_urls", "--image_dir", f"{site}/to/file:///etc/passwd")
        assert_refused(refused, "file:///etc/passwd: redirects to an address whose pictures are not fetched")
        for bad in ("http://[::1/a.png", f"{site}/a b\0.png"):
            assert_refused(run("--allow_urls", "--image_dir", bad), "not a plain http or https URL")
        assert_refused(run("--allow_urls", "--image_dir", f"{site}/%00{'%C3%A4' * 300}"), "the server answers 404")
        assert_refused(run("--allow_urls", "--image_dir", "ftp://example.com/a.png"), "a URL; download")
    finally:
        server.shutdown()
        server.server_close()
    assert_refused(
        run("--allow_urls", "--image_dir", url), "cannot be downloaded (", "; check the address and the netw"
    )


@pytest.mark.parametrize(
    "url, name",
    [
        ("http://host", "page"),
        ("https://host/", "page"),
        ("http://host?a/b", "page"),
        ("http://host/x/a%20b.pdf?c=d/e.png#f/g", "a b.pdf"),
        ("http://host/x/..%2Fa%00.png", "a.png"),
        ("http://host/..", "page"),
    ],
)
def test_the_name_in_a_url(url, name):
    assert sources.name_of(url) == name


def test_a_killed_run_loses_nothing_and_goes_on(folder, tmp_path):
    """Also without the time to end a line; the second run answers exactly the pages that the first did not."""
    write_pages(tmp_path / "scan.pdf", [picture(number % 5) for number in range(40)])
    output = tmp_path / "out" / "pages.jsonl"
    command = [sys.executable, "-m", "mindvlm.tools.predict_llm", "--image_dir", str(tmp_path / "scan.pdf")]
    command += ["--config_path", str(folder / "tiny.yaml"), "--mode", "pynative", "--max_new_tokens", "4"]
    command += ["--output_dir", str(tmp_path / "out"), "--batch_size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not output.exists() or output.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    num_done = before.count(b"\n")
    assert 5 <= num_done < 40 and not (tmp_path / "out" / "scan.txt").exists()
    with open(output, "ab") as file:
        file.write(before[:50])
    # from another folder, where the document has another name
    command[command.index(str(tmp_path / "scan.pdf"))] = "scan.pdf"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert (
        f"{num_done} of 40 pages are answered" in done.stderr and done.stdout.count("scan.pdf, page ") == 40 - num_done
    )
    assert [record["page"] for record in json_lines(output)] == list(range(1, 41))
    assert set(before.splitlines()[:num_done]) <= set(output.read_bytes().splitlines())
    assert (tmp_path / "out" / "scan.txt").read_text().count("\f") == 39


def test_an_unlikely_size(loaded, run, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_PAGE_PIXELS", 10_000)
    (tmp_path / "a.pdf").write_bytes(bare_pdf("0 0 20000 20000"))
    status, _, err = run("--image_dir", tmp_path / "a.pdf", *SHORT)
    assert status == 0 and re.match(r"warning: .*a.pdf, page 1: 20000 x 20000 points, rendered with .* dpi", err)
