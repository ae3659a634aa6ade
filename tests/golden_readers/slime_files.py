"""SliME's cases without weights: tiling, pixels, position tables, and the keys of the published models."""

import re

import numpy as np
from PIL import Image

from mindvlm.models.slime import released
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import HF, STATISTICS, infos_of
from mindvlm.models.slime.positions import resize_matrix, sine_table
from mindvlm.models.slime.views import MAX_CROPS, ViewsConfig, candidate_sizes, slices
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.images.tiling import fit_on_black, grid_shape
from mindvlm.processing.images.transforms import centre_on_square, normalize
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case, read_arrays
from tests.golden_readers.report import PIXEL_BOUND, Report

TILING, KEYS, INFO = "tiling.json", "state_dict_keys.json", "info.json"
PIXELS = re.compile(r"(anyres|any_res|pad_then_devide|pad|default)\.(\w+?)(?:__s(\d+))?")
TABLE = re.compile(r"sincos_d(\d+)_g(\d+)(?:_to(\d+))?(?:_(fp16|fp32))?(?:__cols(\d+))?")
SUM_BOUND = 1e-9


def is_tiling(case: Case) -> bool:
    return "rows" in (case.documents.get(TILING) or {})


def is_pixels(case: Case) -> bool:
    return not case.weights.exists() and any(PIXELS.fullmatch(name) for name in case.outputs)


def is_tables(case: Case) -> bool:
    return KEYS in case.documents and (case.folder / "pos.npz").exists()


def read_tiling(case: Case, report: Report) -> None:
    """Compares the grid of every size, the resized picture on its canvas, and the crops."""
    for rows in ("rows", "rows_other_crop"):
        found: dict[str, list] = {}
        for row in case.documents[TILING].get(rows, ()):
            for key, value in tiled(tuple(row["image_size"]), row["crop_size"]).items():
                if key in row:
                    found.setdefault(key, []).append((str(row["image_size"]), value, row[key]))
        for key, pairs in found.items():
            report.same(f"{TILING} {rows} {key}", pairs)
    report.skip(f"{TILING} pinpoint_rule_unused", "the original computes it and does not use it")


def tiled(size: tuple[int, int], crop: int) -> dict[str, object]:
    """Returns the recorded columns for a picture of a size, as the production code has them."""
    # the place of a white picture on the canvas shows how it was resized and pasted
    white = Image.new("RGB", size, "white")
    columns, lines = grid_shape(size, candidate_sizes(size, crop), crop)
    canvas = (columns * crop, lines * crop)
    left, top, right, bottom = fit_on_black(white, canvas).getbbox()
    parts, grid = ViewsConfig(size=crop).crops(white)
    boxes = [[x, y, x + crop, y + crop] for y in range(0, canvas[1], crop) for x in range(0, canvas[0], crop)]
    return {
        "canvas": list(canvas),
        "grid_cols_rows": list(grid),
        "num_crops": len(parts),
        "resized": [right - left, bottom - top],
        "paste_offset": [left, top],
        "crop_boxes": boxes,
        "any_res_slices_cols_rows": list(slices(white, crop)[1]),
        "pad_square_side": centre_on_square(white).width,
    }


def read_pixels(case: Case, report: Report) -> None:
    """Compares the pixels of every view in every mode, and their sums."""
    paths = {path.stem: path for path in case.pictures()}
    views: dict[tuple[str, str], np.ndarray] = {}
    for name in case.outputs:
        mode, picture, step = PIXELS.fullmatch(name).groups()
        pixels = views[picture, mode] = all_views(paths[picture], mode)
        shown = pixels[:, :, :: int(step), :: int(step)] if step else pixels
        report.close(name, shown[0] if case.outputs[name].ndim == 3 else shown, bound=PIXEL_BOUND)
    for picture, recorded in case.documents.get(INFO, {}).items():
        for mode, sums in recorded.items():
            if (picture, mode) not in views:
                continue
            pixels = views[picture, mode].astype(np.float64)
            returned = [1, *pixels.shape] if mode in MAX_CROPS and MAX_CROPS[mode] else list(pixels.shape)
            report.same(f"{INFO} {picture} {mode} shape", [("shape", returned, sums["returned_shape"])])
            ours = np.array([pixels.sum(), np.abs(pixels).sum(), *pixels.sum((1, 2, 3))])
            theirs = np.array([sums["sum"], sums["abs_sum"], *sums["view_sums"]])
            error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            report.check(f"{INFO} {picture} {mode} sums", error, bound=SUM_BOUND)


def all_views(path, mode: str) -> np.ndarray:
    """Returns the views (V, 3, height, width) of a picture, the global one first."""
    image, views = load_image(path), ViewsConfig(mode="plain" if mode == "default" else mode)
    parts = views.crops(image)[0] if MAX_CROPS[views.mode] else []
    return np.stack([normalize(part) for part in (views.global_view(image), *parts)])


def read_tables(case: Case, report: Report) -> None:
    """Compares position tables, and names and shapes of the published models' tensors."""
    tables = read_arrays(case.folder / "pos.npz")
    report.recorded.update(tables)
    report.open_names |= tables.keys()
    for name in tables:
        width, grid, new, kind, step = TABLE.fullmatch(name).groups()
        table = sine_table(int(width), int(grid))
        if new:
            table = resize_matrix(int(grid), int(new)) @ table.astype(np.float16).astype(np.float32)
        table = table.astype(np.float16).astype(np.float32) if kind == "fp16" else table
        report.close(name, table[:, :: int(step or 1)])
    for model, shapes in case.documents[KEYS].items():
        config = from_hf_config(getattr(released, f"{model}_config")())
        ours = {name: list(info.shape) for name, info in make_plan(HF.reverse(), infos_of(config)).infos.items()}
        ours |= {f"model.mm_projector.{name}": [1] for name in STATISTICS}
        report.same(f"{KEYS} {model}", [(name, ours.get(name), shapes.get(name)) for name in {**ours, **shapes}])
