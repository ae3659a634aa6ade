"""Trains the decoder of a DeLVM on packs of codes, or its VQGAN on pictures.

B rows, L codes of a row.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import nn

from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext
from mindvlm.models.delvm.distillation import DistillationConfig
from mindvlm.models.delvm.held_out import HeldOutCodes, HeldOutConfig
from mindvlm.models.delvm.memory import pass_memory
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.packing import MIN_LENGTH, Pack, PackedTokens, PackOrder
from mindvlm.models.delvm.picture_data import (
    HeldOutPictures,
    HeldOutPicturesConfig,
    PictureData,
    PicturesConfig,
)
from mindvlm.models.delvm.picture_loss import PictureLoss, PictureLossConfig
from mindvlm.models.delvm.teacher import add_teacher, teacher_weights
from mindvlm.models.delvm.token_files import TokenFile, find_token_files
from mindvlm.models.own_training import Evaluator, OwnTraining, PassInputs
from mindvlm.processing.samples.label_rules import IGNORED_LABEL

NUM_ROW_STEPS = 4
"""The rows of a pass grow in steps of this share of the fewest, because each number of rows has a graph."""


@dataclass(kw_only=True)
class CodesConfig:
    """Files of codes.

    Attributes:
        codes: folder with the files, relative to the job's file.
        batch_size: packs of a device in one pass.
        pack_length: codes of a pack, a multiple of `segment_length`.
        segment_length: the longest segment; attention is confined to segments.
        packing: "pack": a segment belongs to one sentence; "one": a segment may hold several.
        min_length: shorter sentences are left out.
        ignore_code_0: code 0 is no target, as in the original.
    """

    codes: str
    batch_size: int = 1
    pack_length: int = 32768
    segment_length: int = 2048
    packing: Literal["pack", "one"] = "pack"
    min_length: int = MIN_LENGTH
    ignore_code_0: bool = True

    def __post_init__(self) -> None:
        for key in ("batch_size", "pack_length", "segment_length", "min_length"):
            if getattr(self, key) < 1:
                raise UserError(f"data.{key} is {getattr(self, key)}; expected at least 1")
        if self.pack_length % self.segment_length:
            raise UserError(
                f"data.pack_length is {self.pack_length}; expected a multiple of data.segment_length, "
                f"{self.segment_length}"
            )

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.codes = resolve_path(self.codes, config_path)


class PackedData:
    """Batches of packs, in the order of the original program.

    Args:
        config: the section `data` of the job.
        run_config: of the model.
        seed: seed of both orders, of sentences in a file and of packs in an epoch.
        share: share of this process; see `OwnTraining.open_data`.

    Raises:
        UserError: a file is missing or damaged, the sizes do not fit the model, or the data fill no batch.
    """

    num_skipped = 0

    def __init__(self, config: CodesConfig, run_config: Any, *, seed: int, share: Any):
        limit, vocab_size = run_config.model.max_length, run_config.model.language_model.vocab_size
        if config.segment_length > limit:
            raise UserError(
                f"data.segment_length is {config.segment_length} but model.max_length is {limit}; lower the first or "
                "raise the second"
            )
        self.config, self.share = config, share
        folder = Path(config.codes)
        options = {"mode": config.packing, "min_length": config.min_length, "ignore_code_0": config.ignore_code_0}
        lengths = (config.pack_length, config.segment_length)
        self.files = [
            PackedTokens(TokenFile(path, vocab_size), *lengths, seed=seed, **options)
            for path in find_token_files(folder)
        ]
        self.ends = np.cumsum([len(packs) for packs in self.files])
        names = [str(packs.file.path.relative_to(folder)) for packs in self.files]
        self.identity = {f"packs of {name}": len(packs) for name, packs in zip(names, self.files, strict=True)}
        # other codes have other numbers of digits, and so other offsets
        for name, packs in zip(names, self.files, strict=True):
            self.identity[f"index of {name}"] = zlib.crc32(packs.file.offsets.tobytes())
        num_packs = int(self.ends[-1])
        if not num_packs:
            most = max(int(packs.ends[-1]) if len(packs.ends) else 0 for packs in self.files)
            raise UserError(
                f"{folder}: no file fills a pack of {config.pack_length} codes, the largest has {most} in sentences of "
                f"at least {config.min_length}; lower data.pack_length, or give more data"
            )
        packs_per_step = config.batch_size * share.num_passes
        self.order = PackOrder(num_packs, packs_per_step, rank=share.shard, num_ranks=share.num_shards, seed=seed)
        self.steps_per_epoch = num_packs // (packs_per_step * share.num_shards)
        self.rows_per_epoch = self.steps_per_epoch * packs_per_step * share.num_shards
        self.batches: Iterator[np.ndarray] = iter(())
        self.num_steps = 0

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        self.num_steps = step
        self.batches = self.order.batches(step)

    def take(self) -> list[PassInputs]:
        numbers = next(self.batches).reshape(self.share.num_passes, self.config.batch_size)
        self.num_steps += 1
        return [self.inputs(one.tolist()) for one in numbers]

    def inputs(self, numbers: Sequence[int]) -> PassInputs:
        """Returns the inputs of one pass, by the numbers of its packs."""
        packs, origins = [], []
        for number in numbers:
            place = int(np.searchsorted(self.ends, number, side="right"))
            packed = self.files[place]
            within = number - int(self.ends[place]) + len(packed)
            packs.append(packed[within])
            origins.append(f"pack {within} of {packed.file.path}")
        arrays = rows_of(packs, self.config.segment_length)
        return PassInputs(arrays, len(packs) * self.config.pack_length, origins)

    def observe(self, loss: float) -> None:
        return None

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
        pass


def rows_of(packs: Sequence[Pack], length: int) -> dict[str, np.ndarray]:
    """Lays the segments of packs into rows, none of them divided, and the longest first.

    Returns:
        `codes`, `labels`, `positions` and `segment_ids` (B, length) int32; only the first two if each row is one
        segment. Unused ends of rows have code 0, no label and segment -1.
    """
    segments = [
        (start, end, pack) for pack in packs for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)
    ]
    segments.sort(key=lambda segment: segment[0] - segment[1])
    rows: list[list[tuple[int, int, Pack]]] = []
    free: list[int] = []
    for start, end, pack in segments:
        place = next((row for row, room in enumerate(free) if room >= end - start), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(length)
        rows[place].append((start, end, pack))
        free[place] -= end - start
    fewest = sum(len(pack.input_ids) for pack in packs) // length
    step = max(1, fewest // NUM_ROW_STEPS)
    shape = (-(-len(rows) // step) * step, length)
    arrays = {"codes": np.zeros(shape, np.int32), "labels": np.full(shape, IGNORED_LABEL, np.int32)}
    arrays |= {"positions": np.zeros(shape, np.int32), "segment_ids": np.full(shape, -1, np.int32)}
    for row, placed in enumerate(rows):
        begin = 0
        for number, (start, end, pack) in enumerate(placed):
            here = slice(begin, begin + end - start)
            for name, values in (("codes", pack.input_ids), ("labels", pack.labels), ("positions", pack.positions)):
                arrays[name][row, here] = values[start:end]
            arrays["segment_ids"][row, here] = number
            begin = here.stop
    if (arrays["segment_ids"] == 0).all():
        del arrays["positions"], arrays["segment_ids"]
    return arrays


def sections(job: dict[str, Any]) -> dict[str, type]:
    """Returns the sections of a job that belong to this family; those of a VQGAN if its data are pictures."""
    if "pictures" in (job.get("data") or {}):
        return {"data": PicturesConfig, "evaluation": HeldOutPicturesConfig, "vqgan_loss": PictureLossConfig}
    return {"data": CodesConfig, "evaluation": HeldOutConfig, "distillation": DistillationConfig}


def open_data(config: CodesConfig | PicturesConfig, run_config: Any, **options: Any) -> PackedData | PictureData:
    """Opens the batches of a job. Raises UserError if they are not what the model trains on; see `OwnTraining`."""
    takes_pictures = run_config.model.language_model is None
    if takes_pictures != isinstance(config, PicturesConfig):
        what = ("a VQGAN alone", "data.pictures") if takes_pictures else ("a decoder", "data.codes")
        raise UserError(f"data: the model is {what[0]}, which trains on {what[1]}; set that key")
    return (PictureData if takes_pictures else PackedData)(config, run_config, **options)


def make_trained(model: DelvmModel, run_config: Any, sections: Mapping[str, Any], context: BuildContext) -> nn.Cell:
    """Returns the Cell that a job trains; see `OwnTraining`."""
    if run_config.model.language_model is not None:
        return add_teacher(model, run_config, sections, context)
    if context.dtype != ms.float32:
        raise UserError(f"dtype is {str(context.dtype).lower()}, but a VQGAN trains in float32; set dtype: float32")
    return PictureLoss(model.vqgan, sections.get("vqgan_loss") or PictureLossConfig())


def open_evaluator(config: HeldOutConfig | HeldOutPicturesConfig, *arguments: Any, **options: Any) -> Evaluator:
    """Opens the evaluation of a job; see `OwnTraining`."""
    kind = HeldOutPictures if isinstance(config, HeldOutPicturesConfig) else HeldOutCodes
    return kind(config, *arguments, **options)


TRAINING = OwnTraining(
    sections=sections,
    open_data=open_data,
    pass_memory=pass_memory,
    make_trained=make_trained,
    frozen_weights=teacher_weights,
    open_evaluator=open_evaluator,
    # the teacher is compared by its weights
    free_keys=frozenset({"data.codes", "data.pictures", "data.num_workers", "distillation.teacher"}),
)
