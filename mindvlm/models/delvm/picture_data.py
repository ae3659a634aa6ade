"""Folders of pictures as the data of a VQGAN: batches in a random order, and the evaluation of held-out pictures."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from PIL import Image

from mindvlm.core import runtime
from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.files import PICTURE_SUFFIXES
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.processor import DelvmProcessor, DelvmProcessorConfig
from mindvlm.models.own_training import Evaluation, PassInputs
from mindvlm.processing.images.loading import load_image

logger = logging.getLogger(__name__)

NUM_SHOWN = 5


@dataclass(kw_only=True)
class PicturesConfig:
    """A folder of pictures, the section `data` of a job that trains a VQGAN.

    Attributes:
        pictures: folder, relative to the job's file; folders in it are read, too.
        batch_size: pictures of a device in one pass.
        size: edge of the pictures in pixels; None for the resolution of the model, the only one allowed.
        num_workers: threads that read pictures.
        min_crop: the smallest edge of the random square that is cut out, as a share of the shortest edge of the
            picture; 1 takes the centre, as prediction does.
        flip: whether half of the pictures are mirrored.
    """

    pictures: str
    batch_size: int = 16
    size: int | None = None
    num_workers: int = 2
    min_crop: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        for key in ("batch_size", "num_workers"):
            if getattr(self, key) < 1:
                raise UserError(f"data.{key} is {getattr(self, key)}; expected at least 1")
        if not 0 < self.min_crop <= 1:
            raise UserError(f"data.min_crop is {self.min_crop}; expected a number above 0, up to 1")

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.pictures = resolve_path(self.pictures, config_path)


@dataclass(kw_only=True)
class HeldOutPicturesConfig:
    """Held-out pictures, the section `evaluation` of a job that trains a VQGAN.

    Attributes:
        pictures: folder, relative to the job's file.
        num_pictures: how many to read, spread over the sorted files; 0 for all.
        batch_size: pictures of a batch.
    """

    pictures: str
    num_pictures: int = 128
    batch_size: int = 16
    FIGURES: ClassVar[tuple[str, ...]] = ("val_mse",)

    def __post_init__(self) -> None:
        for key, least in (("num_pictures", 0), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise UserError(f"evaluation.{key} is {getattr(self, key)}; expected at least {least}")

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.pictures = resolve_path(self.pictures, config_path)


def find_pictures(folder: Path) -> list[Path]:
    """Returns the picture files below a folder, sorted. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give a folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{folder}: holds no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}); give another folder")
    return found


class PictureData:
    """Batches of pictures. Each epoch has another order, which seed and epoch determine.

    A picture that cannot be read is reported and replaced by the next one in the order of the files.

    Args:
        config: the section `data` of the job.
        run_config: of the model.
        seed: seed of order, crops and flips.
        share: share of this process; see `OwnTraining.open_data`.

    Raises:
        UserError: there are no pictures, fewer than a step takes, or the size is not the model's.
    """

    def __init__(self, config: PicturesConfig, run_config: Any, *, seed: int, share: Any):
        size = run_config.model.vqgan.resolution
        if config.size not in (None, size):
            raise UserError(f"data.size is {config.size} but model.vqgan.resolution {size}; set one to the other")
        self.config, self.seed, self.share = config, seed, share
        self.processor = DelvmProcessor(DelvmProcessorConfig(size=size))
        self.paths = find_pictures(Path(config.pictures))
        self.per_step = config.batch_size * share.num_passes * share.num_shards
        self.steps_per_epoch = len(self.paths) // self.per_step
        self.rows_per_epoch = self.steps_per_epoch * self.per_step
        if not self.steps_per_epoch:
            raise UserError(
                f"{config.pictures}: holds {len(self.paths)} pictures but a step takes {self.per_step}; lower "
                "data.batch_size, or give more pictures"
            )
        self.identity = {"pictures": len(self.paths)}
        self.unreadable: set[Path] = set()
        self.num_steps = 0
        self.pool: ThreadPoolExecutor | None = None
        self.ahead: tuple[list[int], list[Future]] | None = None
        self.numbers: Iterator[list[int]] = iter(())

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        self.num_steps = step
        self.pool = ThreadPoolExecutor(self.config.num_workers)
        self.numbers = self.rows_from(step)
        self.ahead = self.read_next()

    def rows_from(self, step: int) -> Iterator[list[int]]:
        """Yields the rows of this process in each step: row n of the run is picture n of the epochs in sequence."""
        per_process = self.config.batch_size * self.share.num_passes
        while True:
            first = step * self.per_step + self.share.shard * per_process
            yield list(range(first, first + per_process))
            step += 1

    def read_next(self) -> tuple[list[int], list[Future]]:
        rows = next(self.numbers)
        epoch = rows[0] // self.rows_per_epoch
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.paths))
        places = [int(order[row % self.rows_per_epoch]) for row in rows]
        return places, [self.pool.submit(self.read, *one) for one in zip(places, rows, strict=True)]

    def read(self, place: int, row: int) -> np.ndarray:
        """Returns the pixels (3, size, size) float32 of a picture, or of the next one that can be read."""
        for path in (*self.paths[place:], *self.paths[:place]):
            if path in self.unreadable:
                continue
            try:
                return self.processor.pixels(self.augmented(load_image(str(path), keep_alpha=True), row))
            except UserError as error:
                self.unreadable.add(path)
                if len(self.unreadable) <= NUM_SHOWN:
                    more = "; further ones are only counted" if len(self.unreadable) == NUM_SHOWN else ""
                    logger.warning(f"skipped: {error}{more}")
        raise UserError(f"{self.config.pictures}: none of {len(self.paths)} pictures can be read; give others")

    def augmented(self, picture: Image.Image, row: int) -> Image.Image:
        config = self.config
        if config.min_crop == 1 and not config.flip:
            return picture
        rng = np.random.Generator(np.random.PCG64([self.seed, 1, row]))
        if config.min_crop < 1:
            edge = max(1, round(min(picture.size) * rng.uniform(config.min_crop, 1)))
            left, top = (int(rng.integers(length - edge + 1)) for length in picture.size)
            picture = picture.crop((left, top, left + edge, top + edge))
        is_mirrored = config.flip and rng.random() < 0.5
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else picture

    def take(self) -> list[PassInputs]:
        places, futures = self.ahead
        self.ahead = self.read_next()
        pixels = np.stack([future.result() for future in futures])
        self.num_steps += 1
        count = self.config.batch_size
        return [
            PassInputs(
                {"pixels": pixels[start : start + count]},
                count,
                [str(self.paths[place]) for place in places[start : start + count]],
            )
            for start in range(0, len(pixels), count)
        ]

    def observe(self, loss: float) -> None:
        return None

    @property
    def num_skipped(self) -> int:
        return len(self.unreadable)

    @property
    def figures(self) -> dict[str, float]:
        return {"epoch": round(self.num_steps / self.steps_per_epoch, 4)}

    @property
    def state(self) -> dict[str, Any]:
        # the step alone determines the position
        return {}

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return states[0]

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


class Reproduction(nn.Cell):
    """pixels (N, 3, height, width) -> codes (N, P) int32, and the pixels of the codes."""

    def __init__(self, model: DelvmModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, pixels):
        codes = self.model.encode_images(pixels)
        return codes, self.model.decode_images(codes)


class HeldOutPictures:
    """How well codes reproduce held-out pictures, and how many codes they use.

    Args:
        config: the section `evaluation` of the job.
        data: the section `data` of the job.
        run_config: of the model.
        model: of the training step.
        graph_mode: whether Cells are compiled.

    Raises:
        UserError: there are no pictures, or one cannot be read.
    """

    def __init__(self, config: HeldOutPicturesConfig, data: Any, run_config: Any, model: DelvmModel, *, graph_mode):
        vqgan = run_config.model.vqgan
        processor = DelvmProcessor(DelvmProcessorConfig(size=vqgan.resolution))
        paths = find_pictures(Path(config.pictures))
        step = max(1, len(paths) // config.num_pictures) if config.num_pictures else 1
        chosen = paths[::step][: config.num_pictures or None]
        self.pixels = np.stack([processor.pixels(path) for path in chosen])
        self.batch_size, self.num_codes = config.batch_size, vqgan.num_embeddings
        self.model, self.reproduce, self.graph_mode = model, Reproduction(model), graph_mode

    def evaluate(self) -> Evaluation:
        """Returns `val_mse` and `val_psnr` of the pixels in 0..1, and `val_codes` and `val_code_perplexity`.

        `val_psnr` is the mean over the pictures. `val_codes` is the number of codes that occur; their perplexity is
        the exponential of the entropy of their frequencies.
        """
        trains = self.model.training
        self.model.set_train(False)
        try:
            runtime.set_mode(self.graph_mode)
            parts = [self.batch(start) for start in range(0, len(self.pixels), self.batch_size)]
        finally:
            self.model.set_train(trains)
        codes = np.concatenate([part[0] for part in parts])
        errors = np.concatenate([part[1] for part in parts])
        shares = np.bincount(codes[codes >= 0].ravel(), minlength=self.num_codes) / codes.size
        used = shares[shares > 0]
        return Evaluation(
            {
                "val_mse": float(errors.mean()),
                "val_psnr": float(np.mean(-10 * np.log10(np.maximum(errors, 1e-10)))),
                "val_codes": int(len(used)),
                "val_code_perplexity": float(np.exp(-(used * np.log(used)).sum())),
            }
        )

    def batch(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns codes and the error of each picture."""
        pixels = self.pixels[start : start + self.batch_size]
        # all batches have one shape, so that a graph is compiled once
        filled = np.resize(pixels, (self.batch_size, *pixels.shape[1:]))
        codes, made = (part.asnumpy()[: len(pixels)] for part in self.reproduce(Tensor(filled, ms.float32)))
        return codes, np.square(np.clip(made, 0, 1) - pixels).mean((1, 2, 3))
