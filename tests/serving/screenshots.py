"""Takes the pictures of the web page for the docs with the shipped models: `python -m tests.serving.screenshots`."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mindvlm.serving.page import EXAMPLES
from tests.serving.browser import ask, opened_browser
from tests.serving.running import routing

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"
PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


@contextlib.contextmanager
def visited(browser, url: str, **options) -> Iterator:
    """Opens the page and closes it."""
    context = browser.new_context(**{"locale": "en-US", "color_scheme": "light", "device_scale_factor": 1.5} | options)
    page = context.new_page()
    page.goto(url)
    page.locator(".card").first.wait_for()
    yield page
    context.close()


def show(page, picture: str) -> None:
    """Adds a picture to the next question."""
    page.set_input_files("#files", EXAMPLES / picture)
    page.locator("#pictures img").wait_for()


def save(page, name: str) -> None:
    """Saves what the page shows, with a palette, as a small file."""
    page.locator("#question").blur()
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


def main() -> None:
    paths = [ROOT / "configs" / path for path in ("tinyllava/tinyllava_nano.yaml", "vary/vary_nano.yaml")]
    with routing(paths) as server, opened_browser() as browser:
        with visited(browser, server.root, viewport={"width": 1000, "height": 760}) as page:
            show(page, "scene.png")
            for question in ("What color is the circle?", "What word is written in the image?"):
                ask(page, question)
            save(page, "web_light.png")
        with visited(browser, server.root, color_scheme="dark", **PHONE) as page:
            page.select_option("#model", "vary_nano")
            for picture in ("page.png", "invoice.png"):
                show(page, picture)
                ask(page, "Provide the ocr results of this image.")
            save(page, "web_phone.png")
        with visited(browser, server.root, viewport={"width": 1000, "height": 800}) as page:
            page.select_option("#model", "vary_nano")
            page.set_input_files("#files", EXAMPLES / "scan.pdf")
            page.get_by_role("button", name="Read all pages").click()
            page.get_by_text("2 of 2 pages").wait_for()
            page.locator("main").evaluate("node => { node.scrollTop = 0; }")
            save(page, "web_document.png")


if __name__ == "__main__":
    main()
