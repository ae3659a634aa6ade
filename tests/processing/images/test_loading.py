import io
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from mindvlm.core.errors import UserError
from mindvlm.processing.images.loading import load_image

GRADIENT = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def pixels(source) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_path_bytes_picture_and_array_give_the_same(tmp_path):
    picture = Image.fromarray(GRADIENT)
    path = tmp_path / "picture.png"
    picture.save(path)
    for source in (path, str(path), path.read_bytes(), picture, GRADIENT):
        assert (pixels(source) == GRADIENT).all()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP", "TGA", "ICO"])
def test_many_formats_are_read(file_format):
    picture = Image.new("RGB", (32, 16), (200, 30, 30))
    assert abs(pixels(encoded(picture, file_format)).astype(int) - (200, 30, 30)).max() <= 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    assert load_image(Image.new(mode, (4, 3))).size == (4, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(GRADIENT)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (pixels(encoded(stored, "PNG", exif=exif)) == GRADIENT).all()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_gps_values_of_zero_by_zero_leave_the_picture_upright(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x8825] = {1: "N", 2: (IFDRational(7919, 104729),) * 3, 6: IFDRational(7919, 104729)}
    stored = encoded(Image.new("RGB", (16, 24), (200, 30, 30)), file_format, exif=exif)
    number = struct.pack(">II", 7919, 104729)  # Pillow 11.0 does not write 0/0
    assert stored.count(number) == 4
    assert load_image(stored.replace(number, bytes(8))).size == (24, 16)


def test_damaged_exif_data_do_not_matter():
    raw = encoded(Image.new("RGB", (24, 16), (200, 30, 30)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert load_image(raw).size == (24, 16)


def jpeg_of_inks(inks: tuple[int, int, int, int], *, marker: bool, transform: int = 0) -> bytes:
    """Returns a CMYK JPEG that stores these values, with or without the Adobe marker."""
    # Pillow inverts while it writes
    raw = encoded(Image.new("CMYK", (16, 16), tuple(255 - value for value in inks)), "JPEG", quality=95)
    begin = raw.index(b"\xff\xee")
    end = begin + 2 + int.from_bytes(raw[begin + 2 : begin + 4], "big")
    assert raw[begin + 4 : begin + 9] == b"Adobe" and raw[end - 1] == 0
    marked = raw[begin : end - 1] + bytes([transform])
    return raw[:begin] + (marked if marker else b"") + raw[end:]


@pytest.mark.parametrize("marker", [True, False])
@pytest.mark.parametrize(
    ("inks", "colour"),
    [((255, 255, 255, 255), (255, 255, 255)), ((0, 255, 255, 255), (0, 255, 255)), ((255, 128, 0, 128), (128, 64, 0))],
)
def test_a_cmyk_jpeg_stores_255_for_no_ink_with_a_marker_or_without(marker, inks, colour):
    assert abs(pixels(jpeg_of_inks(inks, marker=marker))[8, 8].astype(int) - colour).max() <= 3


def test_ycck_has_the_same_polarity():
    # luma 255 and neutral chroma are the inks 0 after the transform of libjpeg: all inks printed in a Photoshop file
    paper = jpeg_of_inks((0, 128, 128, 255), marker=True, transform=2)
    assert abs(pixels(paper)[8, 8].astype(int) - 255).max() <= 3


def test_cmyk_elsewhere_stores_0_for_no_ink():
    assert (pixels(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF")) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped():
    wide = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    for source in (wide, encoded(Image.fromarray(wide), "PNG"), encoded(Image.fromarray(wide), "TIFF")):
        assert pixels(source)[0, :, 0].tolist() == expected


def test_wide_integers_and_floats_are_scaled():
    assert pixels(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))[0, :, 0].tolist() == [0, 255]
    assert pixels(Image.fromarray(np.array([[0, 10**6]], dtype=np.int32)))[0, :, 0].tolist() == [0, 255]
    assert pixels(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(Image.fromarray(np.array([[0.0, 200.0]], dtype=np.float32)))[0, :, 0].tolist() == [0, 200]
    assert pixels(np.array([[0.0, 1.0]]))[0, :, 0].tolist() == [0, 255]
    assert pixels(np.array([[False, True]]))[0, :, 0].tolist() == [0, 255]


def test_alpha_is_dropped_where_the_colours_carry_the_drawing():
    alpha = np.full((6, 9, 1), 77, dtype=np.uint8)
    assert (pixels(np.concatenate([GRADIENT, alpha], axis=2)) == GRADIENT).all()


@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0)])
def test_a_drawing_that_is_only_in_the_alpha_is_laid_on_paper(ink, paper):
    drawing = np.full((2, 2, 4), ink, dtype=np.uint8)
    drawing[:, :, 3] = [[0, 255], [255, 0]]
    assert pixels(encoded(Image.fromarray(drawing), "PNG"))[:, :, 0].tolist() == [[paper, ink], [ink, paper]]


def test_an_opaque_picture_of_one_colour_stays_as_it_is():
    assert (pixels(np.full((2, 2, 4), 255, dtype=np.uint8)) == 255).all()


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(raw)[0, 0].tolist() == [255, 0, 0]


def test_the_limit_names_file_size_and_limit(tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (50, 40)).save(path)
    assert load_image(path, max_pixels=2000).size == (50, 40)
    with pytest.raises(UserError, match=r"large\.png: 50 x 40 = 2000 pixels, the limit is 1999"):
        load_image(path, max_pixels=1999)


def test_a_picture_that_pillow_does_not_open_is_over_the_limit_of_this_call():
    huge = b"P5 20000 20000 255\n"
    most = 2 * Image.MAX_IMAGE_PIXELS
    for max_pixels, limit in ((50_000_000, 50_000_000), (most + 1, most)):
        with pytest.raises(UserError) as caught:
            load_image(huge, max_pixels=max_pixels)
        assert str(caught.value) == f"the image: 400000000 pixels, the limit is {limit}; make it smaller"
    # the file of an icon says less of its size than the picture in it
    small = encoded(Image.new("L", (1, 1)), "PNG")
    size = b"IHDR" + struct.pack(">2I", 20000, 20000) + small[24:29]
    icon = small[:12] + size + struct.pack(">I", zlib.crc32(size)) + small[33:]
    head = struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(icon), 22)
    with pytest.raises(UserError, match="the image: 400000000 pixels, the limit is 50000000; make it smaller"):
        load_image(head + icon, max_pixels=50_000_000)


def test_the_limit_is_checked_before_decoding(monkeypatch):
    raw = encoded(Image.new("L", (50, 40)), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(UserError, match="the limit is 10"):
        load_image(raw, max_pixels=10)


def test_a_file_of_another_user_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    monkeypatch.setattr("PIL.Image.open", Mock(side_effect=PermissionError(13, "Permission denied", str(path))))
    with pytest.raises(UserError, match=r"secret\.png: cannot be read \(Permission denied\); check its permissions$"):
        load_image(path)


def test_a_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.pgm"
    path.write_bytes(b"P5 100000 100000 255\n")
    with pytest.raises(UserError, match=r"bomb\.pgm: .*10000000000"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no picture at all", "not an image"),
        (encoded(Image.fromarray(GRADIENT), "PNG")[:50], "damaged|cannot be read"),
        (encoded(Image.new("RGB", (200, 200), "red"), "JPEG")[:500], "damaged|cannot be read"),
        (b"P5 0 10 255\n", "not an image|cannot be read"),
    ],
)
def test_unusable_files_are_one_line_that_names_them(tmp_path, content, message):
    path = tmp_path / "page.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_image(path)
    assert "page.png" in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.png: no such file"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="File name too long"):
        load_image("x" * 300)
    with pytest.raises(UserError, match="not a file"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "array", [np.zeros(5), np.zeros((0, 4), np.uint8), np.zeros((3, 8, 8), np.uint8), np.full((2, 2), 7.0)]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(UserError, match="image array of"):
        load_image(array)
