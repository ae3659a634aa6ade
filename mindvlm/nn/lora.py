"""Low-rank adaptation: y = x W^T + b + alpha / rank * dropout(x) A^T B^T (Hu et al. 2021, arXiv 2106.09685).

An adapted `Linear` keeps its parameters and their names and adds two, `lora_A` (rank, in_features) and `lora_B`
(out_features, rank). B starts at zero, so the outputs are unchanged until training.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.errors import UserError
from mindvlm.nn.dropout import RowDropout, table_rows
from mindvlm.nn.linear import Linear


@dataclass(kw_only=True)
class LoraConfig:
    """The section `lora` of a job's YAML.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: dropout probability of A's input in training.
        targets: regular expressions; Linears whose name contains a match are adapted.
        modules_to_save: regular expressions; parameters whose name contains a match are trained in full.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: [r"^language_model\.layers\."])
    modules_to_save: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; expected at least 1")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha is {self.alpha}; expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; expected a number from 0 to below 1")
        if not self.targets:
            raise UserError(
                "lora.targets is empty; name the Linears to adapt, or leave the key out to adapt the decoder's layers"
            )


class LowRank(nn.Cell):
    """scaling * dropout(x) A^T B^T. The adapted Linear holds A and B."""

    def __init__(self, scaling: float, dropout: RowDropout | None = None):
        super().__init__(auto_prefix=False)
        self.scaling = scaling
        self.dropout = dropout
        self.core = low_rank_core(scaling)
        self.dropped_core = dropped_low_rank_core(scaling)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x, a, b):
        """x (N, in_features), a (rank, in_features), b (out_features, rank) -> (N, out_features)."""
        if self.dropout is not None and self.training:
            return self.dropped_core(x, a, b, self.dropout.masks, self.dropout.first_row(x.shape[0]))
        return self.core(x, a, b)

    def widened(self, states, matrix, a, b):
        """Returns states (..., in_features + rank) and a matrix (out_features, in_features + rank).

        Their product is the output of the adapted Linear; the loss needs the factors.
        """
        rows = states.reshape((-1, states.shape[-1]))
        if self.dropout is not None:
            rows = self.dropout(rows)
        reduced = self.matmul(rows, a) * self.scaling
        states = ops.concat((states, reduced.reshape(states.shape[:-1] + (-1,))), -1)
        return states, ops.concat((matrix, b), 1)


@functools.cache
def low_rank_core(scaling: float) -> LowRankCore:
    """Returns the shared LowRankCore of a scaling, which is compiled once for all Linears."""
    return LowRankCore(scaling)


class LowRankCore(nn.Cell):
    """scaling * x A^T B^T; saves only its inputs for the backward pass. Shapes as in `LowRank`."""

    def __init__(self, scaling: float):
        super().__init__(auto_prefix=False)
        self.scaling = scaling
        self.matmul = ops.MatMul(transpose_b=True)
        self.product = ops.MatMul()
        self.by_columns = ops.MatMul(transpose_a=True)

    def construct(self, x, a, b):
        return self.matmul(self.matmul(x, a) * self.scaling, b)

    def bprop(self, x, a, b, out, dout):
        reduced = self.matmul(x, a) * self.scaling
        by_reduced = self.product(dout, b) * self.scaling
        return self.product(by_reduced, a), self.by_columns(by_reduced, x), self.by_columns(dout, reduced)


@functools.cache
def dropped_low_rank_core(scaling: float) -> DroppedLowRankCore:
    """Returns the shared DroppedLowRankCore of a scaling."""
    return DroppedLowRankCore(scaling)


class DroppedLowRankCore(LowRankCore):
    """`LowRankCore` after a `RowDropout`; masks and first are its mask table and `first_row`."""

    def construct(self, x, a, b, masks, first):
        return super().construct(x * table_rows(masks, first, x.shape[0]), a, b)

    def bprop(self, x, a, b, masks, first, out, dout):
        mask = table_rows(masks, first, x.shape[0])
        by_x, by_a, by_b = super().bprop(x * mask, a, b, out, dout)
        return by_x * mask, by_a, by_b, ops.zeros_like(masks), ops.zeros_like(first)


def adapt(linear: Linear, config: LoraConfig, *, dropout: RowDropout | None = None) -> None:
    """Adds `lora_A` and `lora_B` to a Linear; fill them with `first_values`.

    Args:
        linear: the Linear to adapt.
        config: rank and alpha.
        dropout: applied to the input of A.
    """
    dtype = linear.product.dtype
    for name, shape in (("lora_A", (config.rank, linear.in_features)), ("lora_B", (linear.out_features, config.rank))):
        setattr(linear, name, Parameter(initializer("zeros", shape, dtype), name=name))
    linear.lora = LowRank(config.alpha / config.rank, dropout)
    linear.is_adapted = True


def first_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns the initial float32 values of a `lora_A` or `lora_B`, given its full name.

    B is zero. A is uniform within 1 / sqrt(in_features) of zero: torch's kaiming_uniform with a = sqrt(5), as in PEFT.
    """
    if name.endswith("lora_B"):
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(shape[1])
    rng = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def adapted_linears(model: nn.Cell) -> dict[str, Linear]:
    """Returns the adapted Linears of a model by name."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, Linear) and cell.is_adapted}
