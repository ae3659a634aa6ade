"""Pages of PDFs, TIFF files and pictures, and every document that is refused."""

import io
import re
import resource
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images import documents
from mindvlm.processing.images.documents import Document, as_ranges, open_document, page_ranges
from mindvlm.processing.images.loading import load_image

pypdfium2 = pytest.importorskip("pypdfium2")
COLOURS = ("red", "green", "blue")


def coloured(*names: str, size=(40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, name) for name in names]


def write_pages(path, images, **options) -> None:
    first, *others = (image.copy() for image in images)
    first.save(path, save_all=True, append_images=others, **options)


def bare_pdf(*boxes: str, root: str = "") -> bytes:
    """A PDF with empty pages of these sizes, without a table of objects, which PDFium rebuilds."""
    pages = "".join(f"{n} 0 obj<</Type/Page/Parent 2 0 R/MediaBox[{box}]>>endobj\n" for n, box in enumerate(boxes, 3))
    kids = " ".join(f"{n} 0 R" for n, _ in enumerate(boxes, 3))
    tree = f"2 0 obj<</Type/Pages/Kids[{kids}]/Count {len(boxes)}>>endobj\n"
    return f"%PDF-1.7\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n{tree}{pages}trailer<</Root 1 0 R{root}>>\n".encode()


def main_colour(image) -> str:
    pixels = np.asarray(load_image(image), np.int16).reshape(-1, 3).mean(0)
    values = {name: np.array(Image.new("RGB", (1, 1), name).getpixel((0, 0))) for name in COLOURS}
    return min(values, key=lambda name: np.abs(values[name] - pixels).sum())


def colours(source, pages=None, **options) -> list[str]:
    with open_document(source, **options) as document:
        return [main_colour(document.page(number)) for number in document.selected(as_ranges(pages))]


@pytest.mark.parametrize("name", ["a.pdf", "a.tif"])
def test_pages_in_their_order(tmp_path, name):
    path = tmp_path / name
    write_pages(path, coloured(*COLOURS))
    assert colours(path) == list(COLOURS) and colours(path, "3,1-2") == ["blue", "red", "green"]
    # any order, more than once, and as other sources
    with open_document(path.read_bytes()) as document:
        assert document.num_pages == 3 and document.is_paged
        assert [main_colour(document.page(number)) for number in (2, 1, 2)] == ["green", "red", "green"]
    with open(path, "rb") as file:
        assert colours(file, [2]) == ["green"]
    assert colours(path.as_uri(), "2") == ["green"]


def test_a_picture_is_one_page_and_not_decoded_by_opening(tmp_path):
    path = tmp_path / "a.png"
    coloured("red")[0].save(path)
    with open_document(path) as document:
        assert (document.page(1), document.num_pages, document.is_paged) == (path, 1, False)
    # what is no picture is refused when it is loaded
    (tmp_path / "b.png").write_bytes(b"no picture")
    for missing in ("b.png", "none.png", "."):
        with open_document(tmp_path / missing) as document, pytest.raises(UserError):
            load_image(document.page(1))


def test_resolution(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(bare_pdf("0 0 360 720"))
    for dpi, size in ((200, (1000, 2000)), (72, (360, 720)), (10, (50, 100))):
        with open_document(path, dpi=dpi) as document:
            assert document.page(1).size == size and document.page(1).mode == "RGB"
    for dpi in (0, 9, -200, 1201):
        with pytest.raises(UserError, match=f"dpi is {dpi}; expected 10 to 1200"):
            open_document(path, dpi=dpi)


@pytest.mark.parametrize("box", ["0 0 20000 20000", "0 0 200000 1"])
def test_a_huge_page_is_rendered_smaller(box):
    with open_document(bare_pdf(box, "0 0 72 72")) as document:
        with pytest.warns(UserWarning, match="page 1: .* points, rendered with .* dpi instead of 200"):
            width, height = document.page(1).size
        assert width * height <= documents.MAX_PAGE_PIXELS and max(width, height) <= documents.MAX_PAGE_EDGE
        assert width * height > 0.99 * documents.MAX_PAGE_PIXELS or max(width, height) == documents.MAX_PAGE_EDGE
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert document.page(2).size == (200, 200)
    with open_document(bare_pdf(box), max_pixels=10_000) as document, pytest.warns(UserWarning):
        assert np.prod(document.page(1).size) <= 10_000


def test_many_pages_take_constant_memory(tmp_path):
    """PDFium keeps what it has read; each page has its own picture of 300 kB."""
    document = pypdfium2.PdfDocument.new()
    random = np.random.default_rng(0)
    for _ in range(160):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (400, 600), np.uint8)).save(file, "JPEG", quality=95)
        picture = pypdfium2.PdfImage.new(document)
        picture.load_jpeg(file, inline=True)
        picture.set_matrix(pypdfium2.PdfMatrix().scale(60, 40))
        page = document.new_page(60, 40)
        page.insert_obj(picture)
        page.gen_content()
        page.close()
    document.save(tmp_path / "a.pdf")
    document.close()
    script = f"""
import resource
from mindvlm.processing.images.documents import open_document
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_document({str(tmp_path / "a.pdf")!r}, dpi=72) as document:
    peaks = []
    for number in document.selected(None):
        document.page(number)
        peaks.append(peak())
print(peaks[-1] - peaks[40])
"""
    assert resource.RUSAGE_SELF == 0 and (tmp_path / "a.pdf").stat().st_size > 160 * 200_000
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 8_000  # kB; 120 pages would be 24 MB and more


def test_reduced_copies_in_a_tiff_are_no_pages(tmp_path):
    from PIL import TiffImagePlugin

    path = tmp_path / "a.tif"
    with TiffImagePlugin.AppendingTiffWriter(str(path), new=True) as file:
        for image, kind in zip(coloured("red", "red", "blue"), (0, 1, 2), strict=True):
            image.save(file, "TIFF", tiffinfo={documents.SUBFILE_TYPE: kind})
            file.newFrame()
    assert colours(path) == ["red", "blue"]


@pytest.mark.parametrize(("value", "kind"), [(1, 4), ("a", 2), (1.5, 11)])
def test_a_tiff_without_a_usable_kind_of_its_pages(tmp_path, value, kind):
    """All pages are read if all are called reduced copies, or if the tag is damaged."""
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[documents.SUBFILE_TYPE], tags[documents.SUBFILE_TYPE] = kind, value
    first, second = coloured("red", "blue")
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second], tiffinfo=tags)
    assert colours(tmp_path / "a.tif") == ["red", "blue"]


def test_each_page_of_a_tiff_has_its_own_mode_and_limits(tmp_path):
    path = tmp_path / "a.tif"
    write_pages(path, [Image.new("1", (9, 5), 1), Image.new("I;16", (7, 5), 65535), Image.new("RGB", (300, 300))])
    with open_document(path, max_pixels=10_000) as document:
        assert [document.page(number).size for number in (1, 2)] == [(9, 5), (7, 5)]
        assert all(document.page(number).getpixel((0, 0)) == (255, 255, 255) for number in (1, 2))
        with pytest.raises(UserError, match=r"a.tif, page 3: 300 x 300 = 90000 pixels, the limit is 10000"):
            document.page(3)
    path.write_bytes(path.read_bytes()[:-200])
    with open_document(path) as document:
        assert document.page(1).size == (9, 5)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_an_animation_is_its_first_frame_which_is_said(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    write_pages(path, coloured("red", "blue"))
    with pytest.warns(UserWarning, match=f"a.{ending}: an animation of 2 frames, of which the first is read"):
        assert colours(path) == ["red"]
    coloured("green")[0].save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(path) == ["green"]


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(coloured("blue", size=(64, 64))[0]).save(tmp_path / "a.heic")
    assert main_colour(tmp_path / "a.heic") == "blue" and colours(tmp_path / "a.heic") == ["blue"]


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    (tmp_path / "a.pdf").write_bytes(bare_pdf("0 0 72 72"))
    with pytest.raises(UserError, match=r"a.pdf: a PDF, which needs pypdfium2; run: pip install pypdfium2"):
        open_document(tmp_path / "a.pdf")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"%PDF-1.7\n" + bytes(100), "damaged"),
        (bare_pdf(), "damaged"),
        (bare_pdf("0 0 72 72")[:60], "damaged"),
        (
            bare_pdf("0 0 72 72", root="/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<" + "aa" * 32 + ">/U<" + "bb" * 32)
            .replace(b"<" + b"bb" * 32, b"<" + b"bb" * 32 + b">>>/ID[<aa><aa>]"),
            "encrypted",
        ),
    ],
)  # fmt: skip
def test_a_pdf_that_cannot_be_opened(tmp_path, content, expected):
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.pdf: .*{expected}.*; ") as error:
        open_document(tmp_path / "a.pdf")
    assert "\n" not in str(error.value)


def test_a_pdf_without_pages(tmp_path):
    pypdfium2.PdfDocument.new().save(tmp_path / "a.pdf")
    with pytest.raises(UserError, match=r"a\.pdf: a PDF without pages; give one that has pages$"):
        open_document(tmp_path / "a.pdf")
    with pytest.raises(UserError, match="the image: a PDF without pages"):
        open_document((tmp_path / "a.pdf").read_bytes())


def test_pages_that_do_not_exist():
    with open_document(bare_pdf("0 0 72 72", "0 0 72 72")) as document:
        assert document.selected(None) == [1, 2] == document.selected(page_ranges("1-9"))
        # a range beyond the end is one error
        assert document.selected(page_ranges("2-,5-900000000")) == [2, 5]
        assert document.selected(page_ranges("2, 1-2,2")) == [2, 1]
        for number in (0, 3, 5, -1):
            with pytest.raises(UserError, match=f"has 2 pages, no page {number};"):
                document.page(number)


def test_the_first_pages_of_many_ranges_take_no_time():
    document = Document(b"", "a.pdf", num_pages=50_000_000)
    start = time.process_time()
    assert document.selected(page_ranges(",".join(["7-9", *["1-"] * 300])), 5) == [7, 8, 9, 1, 2]
    assert document.selected(page_ranges(",".join(["1-3"] * 200)), 5) == [1, 2, 3] == document.selected(None, 3)
    document = Document(b"", "a.pdf", num_pages=100_000)
    assert document.selected(page_ranges(",".join(["1-", "1-100000", "1-200000"] * 1000))) == [*range(1, 100_001)]
    assert time.process_time() - start < 1


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5) | st.none()), min_size=1, max_size=8),
    st.integers(1, 9),
    st.none() | st.integers(1, 12),
)
def test_each_page_of_ranges_is_read_once_in_their_order(parts, num_pages, limit):
    ranges = [(first, None if more is None else first + more) for first, more in parts]
    expected: list[int] = []
    for first, last in ranges:
        end = num_pages if last is None else min(last, num_pages)
        expected += [number for number in [first, *range(first + 1, end + 1)] if number not in expected]
    text = ",".join(f"{first}-{'' if last is None else last}" for first, last in ranges)
    assert Document(b"", "a.pdf", num_pages).selected(page_ranges(text), limit) == expected[:limit]


def test_page_ranges():
    assert page_ranges("1-3,7") == [(1, 3), (7, 7)] and page_ranges(" 05 -, 2-2") == [(5, None), (2, 2)]
    assert as_ranges([3, 1]) == [(3, 3), (1, 1)] and as_ranges(None) is None and as_ranges("4") == [(4, 4)]
    with pytest.raises(UserError, match=re.escape("pages: 5-2 ends before it begins; give 2-5")):
        page_ranges("1,5-2")
    for text in ("", "0", "a", "1,", "-3", "1-2-3", "1.5", "1;2", "９" * 20, "1" * 5000):
        with pytest.raises(UserError, match="^pages: '.*' is no page; expected numbers from 1, such as 1-3,7") as error:
            page_ranges(text)
        assert len(str(error.value)) < 100
    for number in (0, -2, 1.5):
        with pytest.raises(UserError, match="is no page"):
            as_ranges([number])
