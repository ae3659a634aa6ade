"""Cases of TinyLLaVA's image preprocessing: SigLIP and CLIP towers, tiles, and the web chat."""

import re

import numpy as np
from PIL import Image

from mindvlm.models.tinyllava.processor import clip_branch, siglip_branch
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.images.tiling import choose_resolution, grid_shape, tiles
from mindvlm.processing.images.transforms import chat_picture, eight_bit_colour
from tests.golden_readers.case import Case
from tests.golden_readers.report import IDENTICAL, PIXEL_BOUND, Report

EXPECTED = "expected.json"
PROCESSED = re.compile(r"(siglip|clip)(\d+)\.(\w+)\.(pad|plain|convert_pad)(?:\.(shape|channel_sum|uint8|sub8))?")
TILED = re.compile(r"anyres(\d+)\.(\w+)")
CHAT = re.compile(r"conversation\.(\w+)\.(\w+)\.sub16")
SUM_BOUND = 1e-9
BRANCHES = {"siglip": siglip_branch, "clip": clip_branch}


def is_tinyllava_pictures(case: Case) -> bool:
    return not case.weights.exists() and any(PROCESSED.fullmatch(name) for name in case.outputs)


class PictureReader:
    """Compares every array, and every entry of expected.json."""

    def __init__(self, case: Case, report: Report):
        self.case, self.report = case, report
        self.expected = case.documents.get(EXPECTED, {})
        self.pictures: dict[str, Image.Image] = {path.stem: load_image(path) for path in case.pictures()}

    def read(self) -> None:
        for name in self.case.outputs:
            if found := PROCESSED.fullmatch(name):
                self.compare_processed(name, *found.groups())
            elif found := TILED.fullmatch(name):
                self.report.close(name, self.tiles(int(found[1]), found[2]), bound=PIXEL_BOUND)
            elif found := CHAT.fullmatch(name):
                shown = np.asarray(chat_picture(self.pictures[found[1]], found[2]))
                self.report.close(name, shown[::16, ::16], bound=IDENTICAL)
        self.compare_backgrounds(self.expected.get("process_images", {}))
        self.compare_tilings(self.expected.get("anyres", {}))
        self.compare_chat(self.expected.get("conversation_images", {}))
        self.report.skip(f"{EXPECTED} other_modes", "every picture is made RGB first, so none of them is refused here")

    def compare_processed(self, name: str, tower: str, size: str, picture: str, mode: str, derived: str | None) -> None:
        if mode == "pad" and self.mode_of(picture) == "P":
            self.report.skip(name, "padded before it was made RGB, which depends on the version of Pillow")
            return
        branch = BRANCHES[tower](int(size), aspect_ratio="square" if mode == "plain" else "pad")
        image = self.pictures[picture]
        if derived == "uint8":
            self.report.close(name, np.asarray(branch.resized(image)), bound=IDENTICAL)
            return
        pixels = branch.pixels(image)
        if derived == "shape":
            self.report.close(name, np.array(pixels.shape), bound=IDENTICAL)
        elif derived == "channel_sum":
            self.report.close(name, pixels.sum(axis=(1, 2), dtype=np.float64), bound=SUM_BOUND)
        else:
            self.report.close(name, pixels[:, ::8, ::8] if derived else pixels, bound=PIXEL_BOUND)

    def mode_of(self, picture: str) -> str:
        path = next(path for path in self.case.pictures() if path.stem == picture)
        with Image.open(path) as image:
            return image.mode

    def pinpoints(self, tile: int) -> list[tuple[int, int]]:
        return [tuple(point) for point in self.expected[f"pinpoints{tile}"]]

    def tiles(self, tile: int, picture: str) -> np.ndarray:
        branch: ImageBranchConfig = clip_branch(tile, aspect_ratio="square")
        parts = tiles(self.pictures[picture], self.pinpoints(tile), tile=tile, overview=(tile, tile))
        return np.stack([branch.pixels(part) for part in parts])

    def compare_backgrounds(self, entries: dict) -> None:
        pairs = []
        for name, recorded in entries.items():
            tower, size, what = re.fullmatch(r"([a-z]+)(\d+)\.(\w+)", name).groups()
            if what not in self.pictures:
                continue
            branch = BRANCHES[tower](int(size))
            ours = {"background": list(eight_bit_colour(branch.mean))}
            ours["square_size"] = [max(self.pictures[what].size)] * 2
            pairs.append((name, ours, {key: recorded[key] for key in ours}))
        self.report.same(f"{EXPECTED} process_images", pairs)

    def compare_tilings(self, entries: dict) -> None:
        grids = [int(key.removeprefix("pinpoints")) for key in self.expected if key.startswith("pinpoints")]
        pairs = []
        for picture, recorded in entries.items():
            if picture == "select_best_resolution":
                points = [tuple(point) for point in recorded["pinpoints"]]
                pairs += [
                    (f"{size}", list(choose_resolution(tuple(size), points)), chosen)
                    for size, chosen in recorded["table"]
                ]
                continue
            size, points = self.pictures[picture].size, self.pinpoints(grids[0])
            columns, rows = grid_shape(size, points, grids[0])
            ours = {"image_size": list(size), "best_resolution": list(choose_resolution(size, points))}
            ours |= {"grid_shape": [columns, rows], "tiles": columns * rows + 1}
            pairs.append((picture, ours, recorded))
        self.report.same(f"{EXPECTED} anyres", pairs)

    def compare_chat(self, entries: dict) -> None:
        pairs = []
        for name, recorded in entries.items():
            picture, mode = name.split(".")
            shown = chat_picture(self.pictures[picture], mode)
            sums = np.asarray(shown).sum(axis=(0, 1), dtype=np.int64).tolist()
            pairs.append((name, {"size": list(shown.size), "sum": sums}, recorded))
        self.report.same(f"{EXPECTED} conversation_images", pairs)


def read_tinyllava_pictures(case: Case, report: Report) -> None:
    PictureReader(case, report).read()
