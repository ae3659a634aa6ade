"""The text of models on the web page: Markdown, tables, formulas, boxes, and texts that attack the page."""

import pytest

from mindvlm.serving.page import EXAMPLES
from tests.serving.browser import ask, says

TABLE = (
    r"\begin{tabular}{|l|c|} \hline \multicolumn{2}{|c|}{Both} \\ \hline a \& b & $x^2$ \\ "
    r"\multirow{2}{*}{high} & 1 \\ & 2 \\ \end{tabular}"
)


@pytest.fixture
def told(script, visit):
    """Returns a function that shows a text as the answer of a model."""
    page = visit(script.url)

    def tell(*pieces: str):
        script.answers = [says(*pieces)]
        return ask(page, "?")

    tell.page = page
    return tell


def test_markdown(told):
    answer = told(
        "# Head\n\n1. one\n3. **three**\n\n- a\n  - b `code`\n\n> said\n\n```py\nx = 1 < 2\n```\n"
        "line one\nline *two*\n\n---"
    )
    html = answer.locator(".text").inner_html()
    assert "<h3>Head</h3>" in html and '<li value="3"><strong>three</strong></li>' in html
    assert "<li>a<ul><li>b <code>code</code></li></ul></li>" in html
    assert "<blockquote><p>said</p></blockquote>" in html and "<pre><code>x = 1 &lt; 2</code></pre>" in html
    assert "<p>line one<br>line <em>two</em></p><hr>" in html


def test_tables(told):
    answer = told(
        "|a|b|\n|:-|-:|\n|1|**2** \\| 3|\n\nText "
        + TABLE
        + " more\n<table><tr><th colspan=2>h</th></tr><tr><td>1</td><td>2</td></tr></table>"
    )
    rows = answer.evaluate(
        "node => [...node.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    assert rows[:2] == [["a", "b"], ["1", "2 | 3"]]
    assert rows[2] == ["Both"] and rows[3][0] == "a & b" and rows[4:6] == [["high", "1"], ["2"]]
    assert rows[6:] == [["h"], ["1", "2"]]
    spans = answer.evaluate(
        "node => [...node.querySelectorAll('[colspan], [rowspan]')].map(cell => [cell.colSpan, cell.rowSpan])"
    )
    assert spans == [[2, 1], [1, 2], [2, 1]]
    assert [text for text in answer.locator("p").all_inner_texts()] == ["Text", "more"]


FORMULAS = {
    r"\frac{a}{b}": "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>",
    r"x_1^{2n}": "<msubsup><mi>x</mi><mn>1</mn><mrow><mn>2</mn><mi>n</mi></mrow></msubsup>",
    r"x^12": "<msup><mi>x</mi><mn>1</mn></msup><mn>2</mn>",
    r"\sqrt[3]{\alpha}": "<mroot><mrow><mi>α</mi></mrow><mrow><mn>3</mn></mrow></mroot>",
    r"\sum_{i=1}^n i": '<munderover><mo movablelimits="true">∑</mo>',
    r"\begin{pmatrix}1&0\\0&1\end{pmatrix}": '<mtr><mtd class="center"><mrow><mn>1</mn></mrow></mtd>',
    r"\left(\frac12\right)": '<mo stretchy="true" fence="true">(</mo>',
    r"\mathbb{R}": "<mi>ℝ</mi>",
    r"a \leq b \text{ if } c": "<mo>≤</mo><mi>b</mi><mtext>&nbsp;if&nbsp;</mtext>",
    r"f'(x)": "<msup><mi>f</mi><mo>′</mo></msup>",
    r"f'^2": "<msup><mi>f</mi><mrow><mo>′</mo><mn>2</mn></mrow></msup>",
    r"\lim_{x\to0}": "<munder><mi>lim</mi>",
    r"\begin{cases}1&x>0\\0\end{cases}": '<mo stretchy="true" fence="true">{</mo><mtable><mtr><mtd class="left">',
    r"a &= b \\ &= c": '<mtable displaystyle="true">',
}


def test_formulas(told):
    answer = told("\n\n".join(f"\\[{source}\\]" for source in FORMULAS))
    shown = answer.locator("math").evaluate_all("nodes => nodes.map(node => node.innerHTML)")
    assert len(shown) == len(FORMULAS)
    for source, found in zip(FORMULAS, shown, strict=True):
        assert FORMULAS[source] in found, source


def test_inline_formulas_and_what_is_none(told):
    answer = told(
        r"Of \( a+b \) and $c^2$, not $1,284.50 and $5 for \(\unknowncommand{x}\) and \(a^\)."
        + "\n\n$$x$$\n\n"
        + r"\begin{align}a&=b\\c&=d\end{align}"
    )
    assert answer.locator("p math").count() == 2 and answer.locator("math[display=block]").count() == 2
    assert answer.locator("code").all_inner_texts() == [r"\unknowncommand{x}", "a^"]
    assert "not $1,284.50 and $5 for" in answer.locator("p").first.inner_text()


def test_deeply_nested_and_long_texts_are_shown(told):
    for text in (
        "> " * 3000 + "x",
        "\\(" + "{" * 2000 + "x\\)",
        "**" * 5000,
        "$a " * 4000,
        "[" * 9000,
        "- " * 2000,
        "|" * 4000 + "\n|-|",
        "\\begin{tabular}{c}" * 300,
        "`" * 4001,
        "\\[" + "\\frac" * 1500 + "\\]",
    ):
        assert told(text).locator(".text").count() == 1


def test_a_text_runs_and_loads_nothing(told):
    attack = "<img src=x onerror=window.broken=1>"
    answer = told(
        f"{attack}<script>window.broken=1</script>\n\n[a](javascript:window.broken=1) ![b](http://example.com/b.png)\n\n"
        f"<table><tr><td onclick='window.broken=1'>{attack}cell</td></tr></table>\n\n|{attack}|\n|-|\n\n"
        f'\\(\\text{{{attack}}}\\) # {attack} [c](https://example.com/"onclick="window.broken=1)'
    )
    assert told.page.evaluate("window.broken") is None
    assert answer.locator("img, script, iframe").count() == 0
    assert answer.locator("[onclick], [onerror], [style]").count() == 0
    assert attack in answer.locator("p").first.inner_text()
    assert all(
        href.startswith("https://") for href in answer.locator("a").evaluate_all("all => all.map(one => one.href)")
    )


def test_boxes_are_drawn_on_the_picture(script, visit):
    page = visit(script.url)
    page.set_input_files("#files", EXAMPLES / "scene.png")
    page.locator("#pictures img").wait_for()
    script.answers = [says("Person: [100, 200, 300, 1000], [000, 000, 050, 050]; Car: [535, 544, 568, 591]")]
    answer = ask(page, "Detect all objects in this image.")
    sizes = "all => all.map(one => ['x', 'y', 'width', 'height'].map(name => Number(one.getAttribute(name))))"
    boxes = [[round(size, 3) for size in box] for box in answer.locator("rect").evaluate_all(sizes)]
    assert boxes == [[0.1, 0.2, 0.2, 0.8], [0, 0, 0.05, 0.05], [0.535, 0.544, 0.033, 0.047]]
    assert answer.locator(".name").all_inner_texts() == ["Person", "Person", "Car"]
    frame, name = answer.locator(".boxed").bounding_box(), answer.locator(".name").first.bounding_box()
    assert abs(name["x"] - frame["x"] - 0.1 * frame["width"]) < 3
    script.answers = [says("[0.25, 0.5, 0.75, 1.0]")]
    answer = ask(page, "Where?")
    assert answer.locator("rect").get_attribute("width") == "0.5"
    script.answers = [says("[3, 2, 1, 0] and [1, 2]")]
    assert ask(page, "None?").locator("figure").count() == 0


def test_an_answer_is_copied(script, visit):
    page = visit(script.url, permissions=["clipboard-read", "clipboard-write"])
    source = "# Sum\n\n|a|b|\n|-|-|\n|1|2|\n\nand \\(x^2\\) **now**"
    script.answers = [says(source)]
    answer = ask(page, "?")
    answer.get_by_label("Copy as Markdown").click()
    answer.locator(".copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == source
    answer.get_by_label("Copy as text").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('Sum')")
    assert page.evaluate("navigator.clipboard.readText()") == "Sum\na\tb\n1\t2\n\nand \\(x^2\\) now"
    answer.get_by_label("Show the source").click()
    assert answer.locator("pre").inner_text() == source
