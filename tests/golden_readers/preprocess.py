"""Cases of image preprocessing: images and the pixel arrays of the towers."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from mindvlm.models.vary.processor import VaryProcessorConfig
from mindvlm.processing.images import transforms
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.loading import load_image
from tests.golden_readers.case import Case
from tests.golden_readers.readme_rules import cropped_slices, sampled_slice
from tests.golden_readers.report import PIXEL_BOUND, Report

SUM_BOUND = 1e-9
DERIVED = "sample|crop|sum|abs_sum|row_sum"
EXACT_PICTURE = re.compile(r"(.+)_high(\d+)")
RESIZE = {"clip": "crop", "keep": "keep", "pad": "pad"}


def read_preprocess(case: Case, report: Report) -> None:
    """Compares the `clip_`, `keep_`, `pad_`, `high_*_`, `alb_*_` arrays and `<name>_high<size>.png` of every image."""
    exact = {path: found for path in case.pictures() if (found := EXACT_PICTURE.fullmatch(path.stem))}
    high_size = next((int(found.group(2)) for found in exact.values()), VaryProcessorConfig(vocab_file="").high.size)
    for path in case.pictures():
        if path not in exact:
            compare_picture(case, report, path, high_size)
    for path, found in exact.items():
        source = next((one for one in case.pictures() if one.stem == found.group(1)), None)
        if source is None:
            report.skip(path.name, "its source picture is not in the folder")
            continue
        ours = np.asarray(transforms.squash(load_image(source), high_size, high_size))
        recorded = np.asarray(Image.open(path).convert("RGB"))
        report.same(path.name, [("pixels", np.array_equal(ours, recorded), True)], note=f"{recorded.size} values")


def branches(case: Case, high_size: int) -> dict[str, ImageBranchConfig]:
    """Returns the settings of each kind of array, with the sizes and statistics of preprocessor_config.json."""
    settings = case.documents.get("preprocessor_config.json", {})
    size = settings.get("crop_size", 224)
    clip_size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    statistics = {
        "mean": settings.get("image_mean", list(transforms.CLIP_MEAN)),
        "std": settings.get("image_std", list(transforms.CLIP_STD)),
    }
    found = {kind: ImageBranchConfig(size=clip_size, resize=resize, **statistics) for kind, resize in RESIZE.items()}
    found["high"] = ImageBranchConfig(size=high_size, resize="squash", **statistics)
    found["alb"] = ImageBranchConfig(
        size=high_size,
        resize="squash_bilinear",
        mean=list(transforms.IMAGENET_MEAN),
        std=list(transforms.IMAGENET_STD),
    )
    return found


def array_parts(name: str, picture: str) -> tuple[str, str | None] | None:
    """Returns kind and derivation of an array of the image, ('high', 'row_sum') for 'high_row_sum_wide'; else None."""
    found = re.fullmatch(rf"(clip|keep|pad|high|alb)(?:_({DERIVED}))?_{re.escape(picture)}", name)
    return found.groups() if found else None


def compare_picture(case: Case, report: Report, path: Path, high_size: int) -> None:
    image = load_image(path)
    pixels: dict[str, np.ndarray] = {}
    for name in case.outputs:
        parts = array_parts(name, path.stem)
        if not parts:
            continue
        kind, derived = parts
        if kind not in pixels:
            pixels[kind] = branches(case, high_size)[kind].pixels(image)
        values = derive(case, derived, pixels[kind])
        if values is None:
            report.skip(name, f"what {derived!r} means is not understood from the README")
        else:
            report.close(name, values, bound=SUM_BOUND if derived and "sum" in derived else PIXEL_BOUND)


def derive(case: Case, derived: str | None, pixels: np.ndarray) -> np.ndarray | None:
    """Returns the part or the sums of the pixels (3, height, width) that an array contains."""
    if derived is None:
        return pixels
    if derived == "sample" and (sampled := sampled_slice(case.readme)):
        return pixels[:, sampled, sampled]
    if derived == "crop" and (cropped := cropped_slices(case.readme)):
        return pixels[:, cropped[0], cropped[1]]
    if derived == "sum":
        return pixels.sum(axis=(1, 2), dtype=np.float64)
    if derived == "abs_sum":
        return np.abs(pixels).sum(axis=(1, 2), dtype=np.float64)
    if derived == "row_sum":
        return pixels.sum(axis=2, dtype=np.float64)
    return None
