"""Loading of pictures from files, bytes, PIL images and arrays."""

import io
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.sources import EncodedSource, encoded_picture, is_heif, what_it_is

DEFAULT_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Default limit of decoded pixels: that of Pillow."""

ImageSource = EncodedSource | Image.Image | np.ndarray

_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that makes the picture upright."""


def load_image(
    source: ImageSource, *, folder: str = "", max_pixels: int = DEFAULT_MAX_PIXELS, keep_alpha: bool = False
) -> Image.Image:
    """Loads a picture as upright RGB with 8 bits per channel.

    Applies the EXIF orientation and takes the first frame of an animation. Alpha is dropped, as in the original
    programs, unless all pixels have the same colour: such a picture is drawn on white, or on black if its colour is
    light. 16-bit, 32-bit and floating-point grey is scaled to 8 bits, not clipped. The values of a CMYK JPEG are
    read as Photoshop writes them, 255 for no ink, with an Adobe marker or without, as Pillow and browsers do.

    Args:
        source: a path, a `file://` or data URL, the bytes of an image file, a file open for reading bytes, a PIL image,
            or an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) of uint8, uint16, bool, or floats in 0..1.
        folder: folder of relative paths.
        max_pixels: limit of width x height, checked before decoding.
        keep_alpha: whether to return a picture of mode RGBA unchanged.

    Raises:
        UserError: the file is missing, empty, damaged, not an image or over the limit, the URL is not local, or the
            array is unsupported.
    """
    if isinstance(source, np.ndarray):
        image = _image_of_array(source)
        _check_size("the array", image.size, max_pixels)
        return _to_rgb(image, keep_alpha)
    if isinstance(source, Image.Image):
        return decode(source, "the image", max_pixels, keep_alpha)
    name, file = encoded_picture(source, folder)
    with open_picture(file, name, max_pixels) as image:
        return decode(image, name, max_pixels, keep_alpha)


def open_picture(file: bytes | Path, name: str, max_pixels: int) -> Image.Image:
    """Opens a picture, which is not decoded yet. Raises UserError with its name if that is impossible.

    Args:
        max_pixels: limit for the message about a picture that is so large that Pillow does not open it.
    """
    try:
        if isinstance(file, Path) and not file.exists():
            raise UserError(f"{name}: no such file; check the path")
        if isinstance(file, Path) and not file.is_file():
            raise UserError(f"{name}: not a file; give an image file")
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
    except OSError as error:  # the name is too long, or the folder is not accessible
        hint = "a picture as base64 is given as data:image/png;base64,..." if len(str(file)) > 255 else "check the path"
        raise UserError(f"{name}: cannot be read ({error.strerror}); {hint}") from error
    if size == 0:
        raise UserError(f"{name}: the file is empty (0 bytes); copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _open(file)
    except Image.DecompressionBombError as error:
        raise _too_large(name, error, max_pixels) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: {what_it_is(file)}") from error
    except PermissionError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # Pillow may raise any exception for damaged files
        raise UserError(f"{name}: cannot be read ({_one_line(error)})") from error


def _open(file: bytes | Path) -> Image.Image:
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return Image.open(stream)
    except Image.UnidentifiedImageError:
        if not add_heif_opener(file):
            raise
    return Image.open(stream)


def add_heif_opener(file: bytes | Path) -> bool:
    """Lets Pillow open HEIC pictures if a file is the first one; returns whether that is new."""
    if "HEIF" in Image.OPEN or not is_heif(file) or not find_spec("pillow_heif"):
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def decode(image: Image.Image, name: str, max_pixels: int, keep_alpha: bool = False) -> Image.Image:
    """Decodes an open picture; see `load_image`. Raises UserError with its name if it is damaged or too large."""
    _check_size(name, image.size, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            upright = _upright(image)
        _check_size(name, upright.size, max_pixels)
        return _to_rgb(upright, keep_alpha)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, error, max_pixels) from error
    except Exception as error:  # see open_picture
        raise UserError(f"{name}: damaged or not supported ({_one_line(error)}); save it again as PNG") from error


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF data, which fails for valid pictures: GPS values 0/0 in Pillow 11.0
    try:
        operation = _TO_UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF data say nothing about the pixels
        operation = None
    return image if operation is None else image.transpose(operation)


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UserError(
            f"{name}: {width} x {height} = {width * height} pixels, the limit is {max_pixels}; "
            "make it smaller or raise max_pixels"
        )


def _too_large(name: str, error: Image.DecompressionBombError, max_pixels: int) -> UserError:
    """Returns the error for a picture of more than twice `Image.MAX_IMAGE_PIXELS`, which Pillow does not open."""
    num_pixels = re.search(r"\d+", str(error))[0]
    limit = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)
    return UserError(f"{name}: {num_pixels} pixels, the limit is {limit}; make it smaller")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image, keep_alpha: bool) -> Image.Image:
    if keep_alpha and image.mode == "RGBA":
        return image
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or (image.mode == "P" and "transparency" in image.info):
        return _without_alpha(image)
    return image.convert("RGB")


def _eight_bit(grey: np.ndarray) -> np.ndarray:
    """Scales wide integers or floats (h, w) to uint8, by the full range of the type or by their own if larger."""
    if grey.dtype.kind == "f":
        grey = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
        full_scale = 1.0 if 0.0 <= grey.min() and grey.max() <= 1.0 else 255.0
    else:
        full_scale = 65535.0
    low = 0.0
    if grey.min() < 0 or grey.max() > full_scale:
        low, full_scale = float(grey.min()), float(grey.max()) - float(grey.min())
    return np.rint((grey.astype(np.float64) - low) * (255.0 / full_scale)).astype(np.uint8)


def _without_alpha(image: Image.Image) -> Image.Image:
    plain = image.convert("RGB")
    extremes = plain.getextrema()
    if any(low != high for low, high in extremes):
        return plain
    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][0] == 255:
        return plain
    is_light = sum(low for low, _ in extremes) > 3 * 127
    ground = Image.new("RGBA", image.size, (0, 0, 0, 255) if is_light else (255, 255, 255, 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")


def _image_of_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"image array of shape {array.shape}: expected (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)")
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8) * np.uint8(255))
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype == np.uint16:
        return Image.fromarray(_eight_bit(array))
    if array.dtype.kind == "f" and 0.0 <= array.min() and array.max() <= 1.0:
        return Image.fromarray(_eight_bit(array))
    raise UserError(f"image array of {array.dtype}: expected uint8, uint16, bool, or floats from 0 to 1")
