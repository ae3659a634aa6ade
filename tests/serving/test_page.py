"""The web page in a browser: conversations, documents, errors, settings, and small screens."""

import re
import threading

import pytest

from mindvlm.core.config import Scope
from mindvlm.serving.errors import ApiError
from mindvlm.serving.page import EXAMPLES
from tests.serving.browser import ANSWERER, LOADING, READER, ask, chunk, refuses, says
from tests.serving.running import running
from tests.tiny_vary import picture, tiny_model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("model")) as started:
        yield started


# ------------------------------------------------------------------------------------------ conversations with a model


def test_a_conversation_with_pictures(server, visit, tmp_path):
    picture(3).save(tmp_path / "one.png")
    picture(4).save(tmp_path / "two.png")
    page = visit(f"{server.root}/")
    bodies = []
    page.on("request", lambda request: request.method == "POST" and bodies.append(request.post_data_json))
    page.set_input_files("#files", tmp_path / "one.png")
    page.locator("#pictures img").wait_for()
    first = ask(page, "read")
    expected = tiny_model().chat("read", picture(3), max_new_tokens=8)
    assert first.locator(".text").inner_text() == str(expected).strip()
    assert re.search(r"tiny · \d+ tokens · \d+(\.\d)? tokens/s · first token after \d", first.inner_text())
    assert page.locator("#pictures img").count() == 0
    page.set_input_files("#files", tmp_path / "two.png")
    page.locator("#pictures img").wait_for()
    ask(page, "and this?")
    history = [message["role"] for message in bodies[-1]["messages"]]
    assert history == ["user", "assistant", "user"]
    assert [len(message["content"]) for message in bodies[-1]["messages"][::2]] == [2, 2]
    assert bodies[-1]["model"] == "tiny" and "temperature" not in bodies[-1]


def test_the_text_streams_and_can_be_stopped(script, visit):
    page = visit(script.url)
    go_on = threading.Event()

    def answer(handler):
        handler.begin_stream()
        handler.send(chunk("Hello"))
        go_on.wait(10)
        while not script.left.wait(0.01):
            handler.send(chunk(" more"))

    script.answers = [answer, says("again")]
    page.fill("#question", "hi")
    page.press("#question", "Enter")
    text = page.locator(".answer .text")
    page.locator(".answer .text", has_text="Hello").wait_for()
    assert page.locator(".answer").get_attribute("aria-busy") == "true" and page.locator("#send").is_hidden()
    go_on.set()
    page.keyboard.press("Escape")
    page.locator(".answer .actions").wait_for()
    assert script.left.wait(10), "the connection is still open"
    assert text.inner_text().startswith("Hello") and "stopped" in page.locator(".answer").inner_text()
    assert page.locator("#send").is_visible()
    page.get_by_label("Answer again").click()
    page.locator(".answer .text", has_text="again").wait_for()
    assert [message["content"] for message in script.asked[1]["messages"]] == [[{"type": "text", "text": "hi"}]]


def test_a_question_can_be_changed(script, visit):
    page = visit(script.url)
    script.answers = [says("one")]
    for question in ("first", "second", "third"):
        ask(page, question)
    page.get_by_label("Edit the question").nth(1).click()
    assert page.input_value("#question") == "second" and page.locator("#editing").is_visible()
    page.fill("#question", "changed")
    page.press("#question", "Enter")
    page.locator(".answer .actions").nth(1).wait_for()
    assert page.locator(".question p").all_inner_texts() == ["first", "changed"]
    texts = [message["content"] for message in script.asked[-1]["messages"]]
    assert texts == [[{"type": "text", "text": "first"}], "one", [{"type": "text", "text": "changed"}]]
    page.get_by_label("New conversation").click()
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(script, visit, event):
    page = visit(script.url)
    page.evaluate(
        """async ([event, file]) => {
            const content = await (await fetch(file)).blob();
            const data = new DataTransfer();
            data.items.add(new File([content], 'note.png', { type: 'image/png' }));
            const options = { bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data };
            const made = event === 'paste' ? new ClipboardEvent('paste', options) : new DragEvent('drop', options);
            document.getElementById('question').dispatchEvent(made);
        }""",
        [event, "examples/page.png"],
    )
    page.locator("#pictures img").wait_for()
    page.get_by_label("Remove note.png").click()
    assert page.locator("#pictures li").count() == 0
    assert page.locator("#camera").get_attribute("capture") == "environment"


def test_an_example_is_asked_about(script, visit):
    script.models, script.answers = {"reader": READER, "answerer": ANSWERER}, [says("It is red.")]
    page = visit(script.url)
    assert page.locator("#model option").all_inner_texts() == ["reader", "answerer"]
    assert page.locator(".card").all_inner_texts() == ["Read it.", "Read it.", "scan.pdf"]
    page.select_option("#model", "answerer")
    assert page.locator(".card").all_inner_texts() == ANSWERER.questions
    page.get_by_role("button", name="What color is the circle?").click()
    page.locator(".answer .actions").wait_for()
    assert script.asked[0]["model"] == "answerer"
    url = script.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,") and page.locator(".shown img").is_visible()
    page.reload()
    page.locator("#model option:checked", has_text="answerer").wait_for(state="attached")


def add(page, folder, *names: str) -> None:
    """Adds small pictures to the question."""
    for name in names:
        picture(3).save(folder / name)
    page.set_input_files("#files", [folder / name for name in names])


def pictures_asked(body: dict) -> list[int]:
    """Returns the number of pictures of each question."""
    questions = [message["content"] for message in body["messages"] if message["role"] == "user"]
    return [sum(part["type"] == "image_url" for part in parts) for parts in questions]


def test_a_model_that_reads_single_pictures_gets_each_question_alone(script, visit, tmp_path):
    script.models, script.answers = {"reader": READER}, [says("one")]
    page = visit(script.url)
    for question in ("first", "second"):
        add(page, tmp_path, "a.png")
        page.locator("#pictures img").wait_for()
        ask(page, question)
    assert [len(asked["messages"]) for asked in script.asked] == [1, 1]
    add(page, tmp_path, "a.png", "b.png")
    page.locator("#pictures img").nth(1).wait_for()
    ask(page, "")
    page.locator(".answer .actions").nth(3).wait_for()
    assert [pictures_asked(body) for body in script.asked[2:]] == [[1], [1]]
    assert page.locator(".question p").all_inner_texts()[2:] == ["Read it."] * 2
    page.fill("#question", "and now?")
    page.press("#question", "Enter")
    page.locator("#notice", has_text="reader answers questions about a picture. Add one").wait_for()
    assert page.input_value("#question") == "and now?" and len(script.asked) == 4


def test_questions_about_single_pictures_are_stopped_together(script, visit, tmp_path):
    def answer(handler):
        handler.begin_stream()
        while not script.left.wait(0.01):
            handler.send(chunk("more"))

    script.models, script.answers = {"reader": READER}, [answer, says("second")]
    page = visit(script.url)
    add(page, tmp_path, "a.png", "b.png")
    page.locator("#pictures img").nth(1).wait_for()
    page.press("#question", "Enter")
    page.locator(".answer .text", has_text="more").wait_for()
    page.keyboard.press("Escape")
    page.locator(".answer .actions", has_text="stopped").wait_for()
    assert page.locator(".turn").count() == 1 and page.locator("#send").is_visible()


def test_pictures_without_a_question(script, visit, tmp_path):
    script.answers = [says("A circle.")]
    page = visit(script.url)
    page.press("#question", "Enter")
    assert page.locator(".turn").count() == 0
    add(page, tmp_path, "a.png", "b.png")
    page.locator("#pictures img").nth(1).wait_for()
    ask(page, "")
    assert page.locator(".question p").inner_text() == "Describe the image."
    assert pictures_asked(script.asked[0]) == [2]


def test_the_limit_of_pictures_is_told_when_they_are_added(server, script, visit, tmp_path):
    assert server.request("GET", "/v1/models/tiny").json()["max_pictures"] == 16
    script.max_pictures, script.answers = 3, [says("fine")]
    page = visit(script.url)
    add(page, tmp_path, *(f"{number}.png" for number in range(5)))
    said = page.locator("#notice", has_text="limited to 3. Left out: 3.png, 4.png")
    said.wait_for()
    assert page.locator("#pictures img").count() == 3
    ask(page, "hi")
    add(page, tmp_path, "6.png")
    page.locator("#notice", has_text="limited to 3. Left out: 6.png").wait_for()
    ask(page, "and now?")
    assert [pictures_asked(body) for body in script.asked] == [[3], [3, 0]]


def test_a_model_says_what_it_is_for(script, visit):
    script.models = {"answerer": ANSWERER, "reader": READER, "other": Scope()}
    page = visit(script.url)
    about = page.locator("#about")
    assert about.inner_text() == "answerer: Answers about shapes."
    page.select_option("#model", "reader")
    page.locator("#language").click()
    assert about.inner_text() == "reader: 识别短行。"
    page.select_option("#model", "other")
    assert about.is_hidden()
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    document = page.get_by_role("region", name="scan.pdf")
    document.wait_for()
    page.select_option("#model", "reader")
    assert document.get_by_text("识别短行。").is_visible() and about.is_hidden()
    page.select_option("#model", "answerer")
    assert document.get_by_text("Answers about shapes.").is_visible()
    page.get_by_label("关闭文档").click()
    assert about.inner_text() == "answerer: Answers about shapes."


def test_the_server_says_what_its_model_is_for(server):
    scope = server.request("GET", "/v1/models").json()["data"][0]["scope"]
    assert scope["questions"][0] == scope["page_question"] == "Provide the ocr results of this image."
    assert scope["note"] == "" and not scope["one_picture"]


# ------------------------------------------------------------------------------------------------------------ documents


def test_a_document_is_read(server, visit):
    page = visit(f"{server.root}/")
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    document = page.get_by_role("region", name="scan.pdf")
    document.locator(".thumbnails img").nth(1).wait_for()
    document.get_by_role("button", name="Page 2: read it").click()
    document.get_by_text("1 of 2 pages").wait_for()
    document.get_by_role("button", name="Read all pages").click()
    document.get_by_text("2 of 2 pages").wait_for()
    expected = [one.text for one in tiny_model().read_document(EXAMPLES / "scan.pdf")]
    cut = "\n\ncut at the longest answer"
    assert document.locator("article .text").all_inner_texts() == [one.strip() + cut for one in expected]
    with page.expect_download() as download:
        document.get_by_label("Download the text").click()
    assert download.value.suggested_filename == "scan.txt"
    assert download.value.path().read_text() == "\f".join(f"{one.rstrip()}\n" for one in expected)
    document.get_by_label("Ask about this page").first.click()
    asked = page.locator("#pictures img")
    assert asked.get_attribute("alt") == "scan.pdf, Page 1"
    page.wait_for_function("document.querySelector('#pictures img').naturalWidth > 500")
    document.get_by_label("Close the document").click()
    assert page.locator("#welcome").is_visible()


def test_a_model_that_reads_is_chosen_for_a_document(script, visit):
    script.models, script.answers = {"answerer": ANSWERER, "reader": READER}, [says("read")]
    page = visit(script.url)
    assert page.input_value("#model") == "answerer"
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    page.get_by_role("button", name="Read all pages").click()
    page.get_by_text("2 of 2 pages").wait_for()
    assert [body["model"] for body in script.asked] == ["reader"] * 2
    assert script.asked[0]["messages"][0]["content"][1]["text"] == "Read it."
    page.reload()
    page.locator("#model option").first.wait_for(state="attached")
    page.select_option("#model", "answerer")
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    page.get_by_label("Page 1: read it").click()
    page.get_by_text("1 of 2 pages").wait_for()
    assert script.asked[-1]["model"] == "answerer"
    assert script.asked[-1]["messages"][0]["content"][1]["text"] == "Describe the image."


def test_a_document_is_read_again(script, visit):
    script.models = {"answerer": ANSWERER, "reader": READER}
    script.answers = [says("yes"), says("yes"), says("Invoice")]
    page = visit(script.url)
    page.select_option("#model", "answerer")
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    page.get_by_role("button", name="Read all pages").click()
    page.get_by_text("2 of 2 pages").wait_for()
    again = page.get_by_role("button", name="Read again")
    assert not again.is_visible() and page.get_by_label("Page 1: go to its text").is_visible()
    page.select_option("#model", "reader")
    page.get_by_label("Page 1: read it").click()
    page.get_by_text("1 of 2 pages").wait_for()
    again.click()
    page.get_by_text("2 of 2 pages").wait_for()
    assert page.locator("article .text").all_inner_texts() == ["Invoice", "Invoice"]
    assert [body["model"] for body in script.asked] == ["answerer"] * 2 + ["reader"] * 2
    page.get_by_role("button", name="Settings").click()
    page.fill("#settings [name=pageQuestion]", "Read the text.")
    page.get_by_role("button", name="Done").click()
    again.click()
    page.get_by_text("2 of 2 pages").wait_for()
    assert [body["messages"][0]["content"][1]["text"] for body in script.asked[4:]] == ["Read the text."] * 2
    page.select_option("#model", "answerer")
    again.wait_for()
    page.select_option("#model", "reader")
    again.wait_for(state="hidden")


def test_pages_that_end_otherwise_say_so(script, visit):
    script.num_pages, script.broken_pages = 6, [2]
    script.answers = [
        says("whole"),
        says("one one one", finish_reason="length", stop_reason="repetition"),
        says("half", finish_reason="length", stop_reason="max_new_tokens"),
        says(),
        refuses(500, "it failed"),
    ]
    page = visit(script.url)
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    for number in (1, 3, 4, 5, 6):
        page.get_by_label(f"Page {number}: read it").click()
        page.locator("article", has=page.get_by_role("heading", name=f"Page {number}", exact=True)).wait_for()
        page.get_by_role("button", name="Read all pages").wait_for()
    page.get_by_label("Page 2: read it").click()
    document = page.get_by_role("region", name="scan.pdf")
    document.get_by_text("Pages that were not read: 2, 6").wait_for()
    assert document.get_by_text("4 of 6 pages").is_visible()
    texts = [text.split("\n")[-1] for text in page.locator("article .text").all_inner_texts()]
    repeated, cut = "cut, it repeated itself", "cut at the longest answer"
    assert texts[0] == "whole" and texts[2:5] == [repeated, cut, "The answer is empty."]
    assert "damaged" in page.locator("article .text").nth(1).inner_text()
    script.broken_pages, script.answers = [], [says("now")]
    page.get_by_role("button", name="Read all pages").click()
    page.get_by_text("6 of 6 pages").wait_for()
    assert document.get_by_text("Pages that were not read").count() == 0 and len(script.asked) == 7


def test_files_that_cannot_be_added(server, visit, tmp_path):
    page = visit(f"{server.root}/")
    files = {
        "bad.pdf": (b"%PDF-1.4 broken", "bad.pdf: damaged"),
        "text.txt": (b"text", "text.txt: not an image"),
        "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg: an SVG drawing"),
        "empty.pdf": (b"", "empty.pdf: the file is empty"),
    }
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#files", tmp_path / name)
        page.locator("#notice", has_text=said).wait_for()
    picture(3).save(tmp_path / "good.png")
    page.set_input_files("#files", [tmp_path / name for name in (*files, "good.png")])
    page.locator("#pictures img").wait_for()
    lines = page.locator("#notice").inner_text().splitlines()
    assert len(lines) == 4 and all(line.startswith(said) for line, (_, said) in zip(lines, files.values(), strict=True))


def test_a_picture_that_the_browser_cannot_show(server, visit, tmp_path):
    picture(3).save(tmp_path / "one.tif")
    page = visit(f"{server.root}/")
    page.set_input_files("#files", tmp_path / "one.tif")
    page.locator("#pictures img").wait_for()
    expected = tiny_model().chat("read", picture(3), max_new_tokens=8)
    assert ask(page, "read").locator(".text").inner_text() == str(expected).strip()


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_shown_and_the_question_can_be_asked_again(script, visit):
    page = visit(script.url)

    def breaks(handler):
        handler.begin_stream()
        handler.send(chunk("Half an"))
        handler.send({"error": {"message": "the engine failed", "type": "server_error", "param": None, "code": None}})

    def leaves(handler):
        handler.begin_stream()
        handler.send(chunk("cut o"))

    script.answers = [
        breaks,
        leaves,
        refuses(429, "64 answers wait", **{"Retry-After": "2"}),
        refuses(500, "it failed"),
        says("fine"),
    ]
    problem = page.locator(".problem")
    answer = ask(page, "hi")
    assert answer.locator(".text").inner_text() == "Half an" and "the engine failed" in problem.inner_text()
    for said in ("The connection broke off", "busy; try again in 2 s. (64 answers wait)", "it failed"):
        problem.get_by_role("button", name="Try again").click()
        page.locator(".problem", has_text=said).wait_for()
    problem.get_by_role("button", name="Try again").click()
    page.locator(".text", has_text="fine").wait_for()
    assert problem.count() == 0 and page.locator(".turn").count() == 1


def test_a_key_is_asked_for(script, visit):
    page = visit(script.url)
    script.answers = [refuses(401, "the key is missing"), refuses(401, "the key is wrong"), says("fine")]
    page.fill("#question", "hi")
    page.press("#question", "Enter")
    for key in ("wrong", "geheim-é"):
        page.fill("#key input", key)
        page.press("#key input", "Enter")
    page.locator(".text", has_text="fine").wait_for()
    assert script.keys[-1].encode("latin-1").decode() == "Bearer geheim-é"
    script.answers = [refuses(401, "the key is missing")]
    page.fill("#question", "again")
    page.press("#question", "Enter")
    page.get_by_role("button", name="Cancel").click()
    page.locator(".problem", has_text="the key is missing").wait_for()


def test_the_page_of_a_server_with_keys_asks_for_one(tmp_path, visit):
    with running(tmp_path, api_keys=("secret",), wait=False) as server:
        page = visit(f"{server.root}/", waits=False)
        page.fill("#key input", "secret")
        page.press("#key input", "Enter")
        page.locator("#model option").first.wait_for(state="attached", timeout=30_000)
        assert page.locator("#model option").all_inner_texts() == ["tiny"]


# ------------------------------------------------------------------------------------------------ settings and screens


def test_settings_are_kept_and_sent(script, visit):
    page = visit(script.url)
    script.answers = [says("fine")]
    page.get_by_role("button", name="Settings").click()
    for name, value in {"temperature": "0.5", "max_tokens": "7", "seed": "0", "system": "Be short."}.items():
        page.fill(f"#settings [name={name}]", value)
    page.get_by_role("button", name="Done").click()
    page.reload()
    page.locator("#model option").first.wait_for(state="attached")
    ask(page, "hi")
    body = script.asked[-1]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 7, 0) and "top_p" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset").click()
    page.keyboard.press("Escape")
    ask(page, "hi")
    assert "temperature" not in script.asked[-1] and script.asked[-1]["messages"][0]["role"] == "user"


def test_languages_and_themes(script, visit):
    page = visit(script.url, locale="zh-CN", color_scheme="dark")
    assert page.locator("h1").inner_text() == "看图提问" and page.locator("html").get_attribute("lang") == "zh-CN"
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#theme").click()
    light = page.evaluate(ground)
    page.locator("#language").click()
    assert page.locator("h1").inner_text() == "Ask about a picture" and light != dark
    page.reload()
    assert page.locator("h1").inner_text() == "Ask about a picture" and page.evaluate(ground) == light


def test_a_phone(script, visit):
    script.answers = [says("|" + "wide column|" * 9 + "\n" + "|-" * 9 + "|\n\n" + "W" * 400)]
    page = visit(script.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    assert page.locator("#shoot").is_visible()
    page.set_input_files("#camera", EXAMPLES / "page.png")
    page.locator("#pictures img").wait_for()
    ask(page, "hi")
    widths = "['html', 'main'].map(name => document.querySelector(name).scrollWidth)"
    assert max(page.evaluate(widths)) <= 360
    for one in page.locator("button:visible, select:visible, textarea:visible").all():
        box = one.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_everything_is_named_and_reached_by_keyboard(script, visit):
    page = visit(script.url)
    script.answers = [says("fine")]
    ask(page, "hi")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')].filter(
            node => node.type !== 'file' && !node.ariaLabel && !node.innerText.trim() && !node.labels?.length
        ).map(node => node.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("[role=status]").inner_text() == "Answer: fine"
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    for name in (
        "model",
        "new",
        "language",
        "theme",
        "open-settings",
        "Edit the question",
        "Answer again",
        "question",
        "attach",
    ):
        assert name in reached
    contrast = page.evaluate(CONTRAST)
    assert min(contrast) >= 4.5, contrast


# of colours on each other, as WCAG defines it
CONTRAST = """() => {
    const linear = (one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    const luminance = (name) => {
        const node = document.body.appendChild(document.createElement('i'));
        node.style.color = `var(--${name})`;
        const [r, g, b] = getComputedStyle(node).color.match(/[\\d.]+/g).map((one) => linear(one / 255));
        node.remove();
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return ['muted ground', 'muted sunken', 'accent ground', 'on-accent accent', 'bad ground'].map((pair) => {
        const [low, high] = pair.split(' ').map(luminance).sort((one, other) => one - other);
        return (high + 0.05) / (low + 0.05);
    });
}"""


def test_a_server_that_loads(script, visit, tmp_path):
    script.models, script.problem, script.answers = {}, LOADING, [says("fine")]
    page = visit(script.url, waits=False)
    page.locator("#waiting", has_text="The model is loading").wait_for()
    page.set_input_files("#files", EXAMPLES / "scan.pdf")
    read = page.get_by_role("button", name="Read all pages")
    read.wait_for()
    add(page, tmp_path, "a.png")
    page.locator("#pictures img").wait_for()
    page.fill("#question", "hi")
    page.press("#question", "Enter")
    page.get_by_label("Page 1: read it").click()
    assert page.locator("#send").is_disabled() and read.is_disabled() and page.locator(".turn").count() == 0
    assert page.locator("#waiting").is_visible() and page.input_value("#question") == "hi"
    script.models = {"tiny": ANSWERER}
    page.locator("#waiting", has_text="Another model is loading").wait_for()
    page.locator("#send:enabled").click()
    page.locator(".text", has_text="fine").wait_for()
    assert read.is_enabled()
    script.problem = None
    page.locator("#waiting").wait_for(state="hidden")
    assert [body["model"] for body in script.asked] == ["tiny"]


@pytest.mark.parametrize("models", [{}, {"tiny": ANSWERER}])
def test_a_model_that_has_failed_too_often(script, visit, models):
    message = "the model m has failed too often; its server must be restarted, see its log"
    script.models, script.problem = models, ApiError(503, message, code="replica_failed")
    page = visit(script.url, waits=False)
    page.locator("#waiting", has_text=message).wait_for()
    assert page.locator("#send").is_enabled() == bool(models)
    script.models, script.problem = {"tiny": ANSWERER}, None
    page.locator("#waiting").wait_for(state="hidden")
    assert page.locator("#send").is_enabled()


def test_a_server_that_is_gone(script, visit):
    page = visit(script.url)
    script.close()
    page.fill("#question", "hi")
    page.press("#question", "Enter")
    page.locator(".problem", has_text="The server cannot be reached").wait_for()


def test_the_files_of_the_page_are_safe(server):
    answer = server.request("GET", "/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)=["'](https?:)?//""", answer.text)
    for path in ("/page.css", "/page.js", "/examples/scene.png", "/examples/scan.pdf"):
        assert server.request("GET", path).status_code == 200
    for path in ("/index.html", "/examples/..%2f..%2fREADME.md", "/page/__init__.py"):
        assert server.request("GET", path).status_code == 404
