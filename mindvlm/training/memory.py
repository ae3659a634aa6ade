"""Estimate of the memory of a training job on each of its devices, from its config alone.

Weights, gradients and the optimizer's state are counted exactly. Activations are those of the decoder's layers, the
loss and the towers, counted operator by operator where the backward pass begins. A step of 8,192 tokens through 4
layers of width 256 added 0.86 GiB on an x86 CPU (0.41 GiB with recompute); 0.97 (0.40) are counted.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import nn

from mindvlm.checkpoint.dtypes import item_size
from mindvlm.core.runtime import DTYPES
from mindvlm.models import loading
from mindvlm.models.base import Family
from mindvlm.models.own_training import PassMemory
from mindvlm.nn.attention_core import causal_slices
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.loss import chunks
from mindvlm.nn.memory import FLOAT32, VisionMemory
from mindvlm.nn.norm import layer_norm_parameters
from mindvlm.nn.parameters import trains
from mindvlm.parallel.buckets import make_buckets
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel, plan_specs
from mindvlm.training.building import choose_trained
from mindvlm.training.config import TrainConfig
from mindvlm.training.datasets.collate import padded_slots
from mindvlm.training.lora import add_lora


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a device in bytes.

    Attributes:
        weights: all parameters, or this process's parts, adapters included.
        gradients: those of a pass, and the float32 ones of a step if several passes or ZeRO-2 accumulate them.
        optimizer: the moments, and the float32 copies of 16-bit parameters.
        activations: estimated peak beside these.
        uncounted: see `PassMemory`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    uncounted: str = ""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Part:
    """Stands for a trained Parameter, or this process's part of it, without its memory."""

    name: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def estimate_training(config: TrainConfig, model_config: Any, family: Family, *, dtype: str) -> TrainingMemory:
    """Returns the estimated memory of a job. Builds the model, which allocates nothing.

    Args:
        config: the job.
        model_config: the run config of its model.
        family: the family of the model.
        dtype: the compute dtype.

    Raises:
        UserError: a pattern of the job matches nothing, or a size cannot be divided.
    """
    parallel, size = config.parallel, item_size(dtype)
    mesh = Mesh(dp=parallel.dp, tp=parallel.tp)
    model, _ = loading.build_model(family, model_config.model)
    divided = ParallelModel(plan_specs(model, family.tensor_parallel, mesh))
    choose_trained(model, config)
    if config.lora:
        # the mask tables of dropout are small, but would be computed
        without_dropout = dataclasses.replace(config.lora, dropout=0.0)
        add_lora(model, without_dropout, seed=None, divided=divided, mesh=mesh)
    trained, num_elements = [], 0
    for name, parameter in model.parameters_and_names():
        shape = tuple(parameter.shape)
        shape = divided.specs[name].part_shape(name, shape) if name in divided.specs else shape
        num_elements += math.prod(shape)
        if parameter.requires_grad:
            trained.append(Part(name, shape, DTYPES[dtype]))
    gradients, optimizer = state_bytes(model, trained, config, divided, mesh, size)
    found = pass_memory(config, model_config, family, size)
    decoder = model_config.model.language_model
    activations = decoder_activations(model, decoder, found, config, size) + found.beside if decoder else 0
    weights = num_elements * size + found.frozen
    return TrainingMemory(weights, gradients, optimizer, max(found.towers, activations), found.uncounted)


def pass_memory(config: TrainConfig, model_config: Any, family: Family, size: int) -> PassMemory:
    """Returns the shape of a pass, and the memory of its parts other than the decoder."""
    if family.training:
        return family.training.pass_memory(model_config, {"data": config.data, **config.own_sections}, size)
    length = config.data.max_length if config.data else model_config.model.max_length
    vision = family.vision_memory(model_config.model, size, False) if family.vision_memory else VisionMemory()
    towers = most_slots(config, model_config, family) * vision.activations
    return PassMemory(num_rows=config.batch_size, length=length, towers=towers)


def most_slots(config: TrainConfig, model_config: Any, family: Family) -> int:
    """Returns the number of views that a batch holds if each row has one picture, with the most views.

    Raises:
        UserError: `data.image_slots` has not one entry for each kind of view.
    """
    views = family.most_views(model_config.processor) if family.most_views else (1,)
    multiples = config.data.slot_multiples(len(views)) if config.data else [1] * len(views)
    return sum(
        padded_slots(config.batch_size * most, multiple) for most, multiple in zip(views, multiples, strict=True)
    )


def state_bytes(
    model: nn.Cell, trained: list[Part], config: TrainConfig, divided: ParallelModel, mesh: Mesh, size: int
) -> tuple[int, int]:
    """Returns the sizes of the gradients and of the optimizer's state, as `TrainStep` allocates them."""
    zero, accumulates = config.parallel.zero, config.num_passes > 1
    num_trained = sum(parameter.size for parameter in trained)
    gradients = num_trained * size
    copies = sum(parameter.size for parameter in trained if parameter.dtype != ms.float32)
    moments = num_trained
    accumulated = num_trained if accumulates else 0
    if zero and trained:
        norms, optimizer = layer_norm_parameters(model), config.optimizer
        buckets = make_buckets(
            trained,
            decays=[optimizer.decays(parameter.name, norms) for parameter in trained],
            is_divided=[parameter.name in divided.specs for parameter in trained],
            mesh=mesh,
            learning_rate_factors=[optimizer.learning_rate_factor(parameter.name) for parameter in trained],
        )
        moments = sum(bucket.chunk_size for bucket in buckets)
        # a bucket of float32 parameters has a copy of one element
        copies = sum(bucket.chunk_size if any(d != ms.float32 for d in bucket.dtypes) else 1 for bucket in buckets)
        accumulated = moments if zero == 2 else accumulated
    return gradients + FLOAT32 * accumulated, FLOAT32 * (2 * moments + copies)


def decoder_activations(
    model: nn.Cell, decoder: DecoderConfig, shape: PassMemory, config: TrainConfig, size: int
) -> int:
    """Returns the peak of a backward pass through the decoder, for rows of the greatest length."""
    num_ranks, whole = config.parallel.tp, decoder
    decoder = decoder.share(num_ranks)
    rows = shape.num_rows * shape.length
    hidden, heads = decoder.hidden_size, decoder.num_attention_heads + decoder.num_key_value_heads
    inner = decoder.intermediate_size
    # input, sum and both norms; queries or keys before and after rotation, values and outputs; branches and product
    layer = rows * size * (4 * hidden + 3 * heads * decoder.head_dim + (4 if decoder.mlp == "gated" else 2) * inner)
    backward = rows * size * (2 * hidden + 2 * inner)
    # fused attention, which needs 16 bits, stores no scores
    slices = causal_slices(shape.length) if size == FLOAT32 or config.attention == "eager" else ()
    widest = max(((stop - start) * num_keys for start, stop, num_keys in slices), default=0)
    scores = 2 * shape.num_rows * decoder.num_attention_heads * widest * FLOAT32
    states = (decoder.num_hidden_layers + 1) * rows * hidden * size
    kept = states + layer if config.recompute else decoder.num_hidden_layers * layer
    return kept + backward + scores + loss_bytes(model, whole, rows, num_ranks, size)


def loss_bytes(model: nn.Cell, decoder: DecoderConfig, rows: int, num_ranks: int, size: int) -> int:
    """Returns the peak of the loss: logits and their gradients, of a chunk of rows in one process."""
    matrix = decoder.vocab_size * decoder.hidden_size * FLOAT32 if trains(model.language_model.lm_head) else 0
    if num_ranks > 1:
        # float32 logits, shifted ones and their exponentials, of all rows
        return rows * decoder.vocab_size // num_ranks * (size + 3 * FLOAT32)
    start, stop = chunks(rows, decoder.vocab_size)[0]
    return (stop - start) * decoder.vocab_size * (size + 3 * FLOAT32) + matrix + rows * decoder.hidden_size * FLOAT32
