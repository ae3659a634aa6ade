"""Fixtures of the tests of the web page."""

import pytest

from tests.serving.browser import ScriptedServer, opened_browser


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as opened:
        yield opened


@pytest.fixture
def script():
    started = ScriptedServer()
    yield started
    started.close()


@pytest.fixture
def visit(browser):
    """Returns a function that opens the page of a server in a fresh profile, and fails if the page had an error."""
    problems, contexts = [], []

    def open_page(url: str, *, waits: bool = True, **options):
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1000, "height": 700}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((url, "data:", "blob:")) or problems.append(request.url)
        )
        page.goto(url)
        if waits:
            page.locator("#model option").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
