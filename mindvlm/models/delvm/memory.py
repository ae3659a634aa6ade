"""Memory of the VQGAN, counted convolution by convolution, and of the passes of training jobs."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindvlm.checkpoint import open_checkpoint
from mindvlm.models.delvm.model_config import DelvmModelConfig, VqganConfig, vqgan_shapes
from mindvlm.models.delvm.teacher import teacher_of
from mindvlm.models.own_training import PassMemory
from mindvlm.nn.memory import FLOAT32, MIB, VisionMemory
from mindvlm.nn.shapes import decoder_shapes

# the compiled graph of a convolution, beside two copies of its weight in other layouts
CONV_BYTES = 2 * MIB
# maps of the size of its input that a convolution, its norm and its activation keep for the way back
NUM_KEPT_MAPS = 11
# maps of the size of the distances of positions to codes in the loss
NUM_DISTANCE_MAPS = 6
# maps of the size of all logits that the distillation loss holds, because not all tensors of its chunks share memory
NUM_LOGIT_MAPS = 4


class Convolution(NamedTuple):
    """A 3 x 3 convolution: positions and channels of its input and output."""

    positions_in: int
    channels_in: int
    positions_out: int
    channels_out: int

    @property
    def peak(self) -> int:
        """Values that are alive at the same time: the input twice, the neighbours of each output, the output."""
        inputs = 2 * self.positions_in * self.channels_in
        return inputs + self.positions_out * (9 * self.channels_in + self.channels_out)


def vision_memory(config: DelvmModelConfig, item_size: int, has_kernels: bool) -> VisionMemory:
    """Returns the memory of the graphs that encode and decode a picture, which hardly share memory.

    Args:
        item_size: bytes per value of the decoder's dtype. The VQGAN computes in float32 with any dtype.
        has_kernels: has no effect.
    """
    if config.vqgan is None:
        return VisionMemory()
    halves = list(encoder_convolutions(config.vqgan)), list(decoder_convolutions(config.vqgan))
    num_weights = sum(map(math.prod, vqgan_shapes(config.vqgan).values()))
    graph = sum(map(len, halves)) * CONV_BYTES + 2 * num_weights * FLOAT32
    scores = 3 * max(attention_positions(config.vqgan), default=0) ** 2
    activations = sum(max(scores, *(one.peak for one in half)) for half in halves) * FLOAT32
    return VisionMemory(graph, activations + num_weights * (FLOAT32 - item_size))


def encoder_convolutions(config: VqganConfig) -> Iterator[Convolution]:
    """Yields the 3 x 3 convolutions of the encoder."""
    width = config.hidden_channels
    yield same_size(positions(config, 0), config.num_channels, width)
    for level, level_width in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            yield same_size(positions(config, level), width, level_width)
            yield same_size(positions(config, level), level_width, level_width)
            width = level_width
        if level < config.num_levels - 1 and config.resample_with_conv:
            yield Convolution(positions(config, level), width, positions(config, level + 1), width)
    for _ in range(4):
        yield same_size(config.num_codes, width, width)
    yield same_size(config.num_codes, width, config.z_channels)


def decoder_convolutions(config: VqganConfig) -> Iterator[Convolution]:
    """Yields the 3 x 3 convolutions of the decoder."""
    width = config.widths[-1]
    yield same_size(config.num_codes, config.z_channels, width)
    for _ in range(4):
        yield same_size(config.num_codes, width, width)
    for level in reversed(range(config.num_levels)):
        for _ in range(config.num_res_blocks + 1):
            yield same_size(positions(config, level), width, config.widths[level])
            yield same_size(positions(config, level), config.widths[level], config.widths[level])
            width = config.widths[level]
        if level and config.resample_with_conv:
            yield same_size(positions(config, level - 1), width, width)
    yield same_size(positions(config, 0), width, config.num_channels)


def same_size(num_positions: int, channels_in: int, channels_out: int) -> Convolution:
    return Convolution(num_positions, channels_in, num_positions, channels_out)


def positions(config: VqganConfig, level: int) -> int:
    return (config.resolution // 2**level) ** 2


def attention_positions(config: VqganConfig) -> list[int]:
    """Returns the number of positions of each map with attention."""
    found = [edge**2 for edge in config.attn_resolutions]
    return found if config.no_attn_mid_block else [*found, config.num_codes]


def pass_memory(run_config: Any, sections: Mapping[str, Any], item_size: int) -> PassMemory:
    """Returns the memory of a pass of a job; see `OwnTraining`. A teacher that is not there is not counted.

    Raises:
        UserError: the teacher of the job cannot be read.
    """
    model, data = run_config.model, sections["data"]
    if model.language_model is None:
        return PassMemory(towers=data.batch_size * trained_vqgan_bytes(model.vqgan))
    num_rows, length = data.batch_size * data.pack_length // data.segment_length, data.segment_length
    wide = sum(map(math.prod, vqgan_shapes(model.vqgan).values())) * (FLOAT32 - item_size) if model.vqgan else 0
    section = sections.get("distillation")
    if section is None:
        return PassMemory(num_rows=num_rows, length=length, frozen=wide)
    if not Path(section.teacher).exists():
        missing = f"the teacher {section.teacher}, which is not there"
        return PassMemory(num_rows=num_rows, length=length, frozen=wide, uncounted=missing)
    teacher = teacher_of(section, run_config)
    decoder, num_codes = teacher.model.language_model, num_rows * length
    is_half = False
    if Path(teacher.checkpoint).exists():
        with open_checkpoint(teacher.checkpoint) as checkpoint:
            is_half = all(info.dtype == "float16" for info in checkpoint.infos.values() if len(info.shape) > 1)
    num_weights = sum(map(math.prod, decoder_shapes(decoder).values()))
    # states, norm and branches of a layer, which are not kept; the last states
    layer = num_codes * (3 * decoder.hidden_size + 3 * decoder.intermediate_size) * item_size
    logits = NUM_LOGIT_MAPS * num_codes * decoder.vocab_size * FLOAT32
    frozen = num_weights * min(item_size, 2 if is_half else FLOAT32)
    return PassMemory(num_rows=num_rows, length=length, frozen=wide + frozen, beside=layer + logits)


def trained_vqgan_bytes(config: VqganConfig) -> int:
    """Returns the activations in bytes of a training pass for one picture.

    A convolution keeps its input, and the norm and the activation before it keep theirs. The neighbours of the widest
    convolution are gathered twice on the way back.
    """
    both = [*encoder_convolutions(config), *decoder_convolutions(config)]
    kept = NUM_KEPT_MAPS * sum(one.positions_in * one.channels_in for one in both)
    distances = NUM_DISTANCE_MAPS * config.num_codes * config.num_embeddings
    return (kept + distances + 2 * max(one.peak for one in both)) * FLOAT32
