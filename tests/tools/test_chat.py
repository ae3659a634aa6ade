"""The chat of `mindvlm-predict --chat_mode`."""

import builtins

import pytest

from tests.tiny_vary import tiny_model
from tests.tools.refusals import assert_refused


@pytest.fixture
def talk(loaded, run, monkeypatch):
    """Runs the chat on lines; an exception among them is raised at the prompt."""

    def talk_lines(*lines, argv=("--chat_mode",), max_new_tokens=3):
        remaining = list(lines)

        def read_line(prompt=""):
            if not remaining:
                raise EOFError
            line = remaining.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read_line)
        status, out, err = run(*argv, "--max_new_tokens", max_new_tokens)
        return status, out, err, remaining

    return talk_lines


def test_chat(talk, images):
    page = str(images / "a.png")
    status, out, err, rest = talk(f"/image {page}", "read", "", "and?", "/reset", "hello", "/exit", "not read")
    model = tiny_model()
    first = model.chat("read", page, max_new_tokens=3)
    hello = model.chat("hello", max_new_tokens=3)
    assert (status, rest) == (0, ["not read"])
    assert out.startswith(f"{first}\n") and out.endswith(f"\n{hello}\n")
    assert "a.png goes with the next question" in err and "forgot all turns and pictures" in err
    assert "/image FILE" in err and "/reset" in err and "/exit" in err


@pytest.mark.parametrize("argv", [("--chat_mode", "yes"), ("--chat_mode", "1"), ("--chat_mode", "True")])
def test_chat_mode_takes_the_words_of_mindocr(talk, argv):
    assert talk("exit", argv=argv)[0] == 0


def test_no_chat_when_it_is_switched_off(talk):
    status, out, _, rest = talk("unread", argv=("--chat_mode", "no", "--query", "hello"))
    assert status == 0 and rest == ["unread"] and out


def test_chat_ends_with_the_input(talk):
    assert talk("hello")[0] == 0


@pytest.mark.parametrize("line", ["/imag page.png", "/foo", "/", "/RESET"])
def test_an_unknown_command_is_no_question(talk, line):
    status, out, err, _ = talk(line)
    assert (status, out) == (0, "")
    assert f"unknown command {line.split()[0]};" in err


@pytest.mark.parametrize("line", ["exit strategies?", "/etc/hosts is what?"])
def test_a_question_that_looks_like_a_command(talk, line):
    _, out, err, _ = talk(line)
    assert out == f"{tiny_model().chat(line, max_new_tokens=3)}\n" and "unknown" not in err


def test_logits_with_nan_do_not_end_the_chat(talk, images, monkeypatch):
    engine = tiny_model().engine
    encode = engine.encode_images
    tiny_model().encoder.cache.clear()
    monkeypatch.setattr(engine, "encode_images", lambda *pixels: encode(*pixels) * float("nan"))
    status, out, err, rest = talk(f"/image {images / 'a.png'}", "read", "/reset", "hello")
    tiny_model().encoder.cache.clear()
    assert (status, out, rest) == (0, f"{tiny_model().chat('hello', max_new_tokens=3)}\n", [])
    assert err.count("error: the logits of token 1 of the answer contain NaN") == 1


def test_a_bad_picture_in_the_chat_is_forgotten(talk, images):
    _, out, err, _ = talk(f"/image {images / 'b.png'}", "/image", "/image no.png", "hello")
    assert out == f"{tiny_model().chat('hello', max_new_tokens=3)}\n"
    assert err.count("error: ") == 2 and "b.png" in err and "/image needs the path" in err


def test_a_bad_picture_before_the_chat_is_refused(loaded, run, images):
    assert_refused(run("--chat_mode", "--image_dir", images / "b.png"), "b.png")


def test_pictures_of_the_command_line_go_with_the_first_question(talk, images):
    page = str(images / "a.png")
    _, out, _, _ = talk("read", argv=("--image_dir", page, "--chat_mode"))
    assert out == f"{tiny_model().chat('read', page, max_new_tokens=3)}\n"


def test_a_full_context_is_said(talk):
    _, out, err, _ = talk("x" * 400, "hello")
    assert "tokens but the context holds 320" in err and "/reset begins a new conversation" in err
    assert out == f"{tiny_model().chat('hello', max_new_tokens=3)}\n"
    _, _, err, _ = talk("x" * 240, max_new_tokens=1000)
    assert "the context is full; /reset begins a new conversation" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(talk, monkeypatch):
    model = tiny_model()
    step, calls = model.engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(model.engine, "step", interrupted)
    status, out, err, _ = talk("read", "go on", max_new_tokens=6)
    assert status == 0 and "[stopped]" in err
    # of a character that was cut nothing is shown
    partial = model.chat("read", max_new_tokens=2).rstrip("\N{REPLACEMENT CHARACTER}")
    assert partial and out.startswith(f"{partial}\n") and len(out) > len(partial) + 2


def test_ctrl_c_while_the_prompt_is_computed(talk, monkeypatch):
    run_prefill, calls = tiny_model().engine.run_prefill, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return run_prefill(*arguments)

    monkeypatch.setattr(tiny_model().engine, "run_prefill", interrupted)
    status, out, err, _ = talk("read", "hello")
    assert status == 0 and "[stopped]" in err
    assert out == f"{tiny_model().chat('hello', max_new_tokens=3)}\n"


def test_ctrl_c_and_bad_bytes_at_the_prompt(talk):
    status, out, err, _ = talk(KeyboardInterrupt(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "hello")
    assert status == 0 and "/exit leaves" in err and "not utf-8 text" in err
    assert out == f"{tiny_model().chat('hello', max_new_tokens=3)}\n"
