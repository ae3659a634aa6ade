"""The loss of a decoder that learns from another one, as the original trains 300M from 1B.

N positions of all rows, V codes.
"""

from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError
from mindvlm.nn.linear import Head
from mindvlm.nn.loss import IGNORED_LABEL, KnownGradient, chunks
from mindvlm.nn.parameters import trains


@dataclass(kw_only=True)
class DistillationConfig:
    """The section `distillation` of a job.

    Attributes:
        teacher: folder of a decoder in either form, or the YAML of one; relative to the job's file.
        gt_weight: weight of the cross-entropy of the labels.
        kd_weight: weight of the divergence from the teacher.
        temperature: divides the logits of both models in the divergence.
        inverse: KL(student || teacher) instead of KL(teacher || student).
        masked: the divergence is the mean over the codes that have a label; false: over all codes, as in the original.
    """

    teacher: str
    gt_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 1.0
    inverse: bool = False
    masked: bool = False

    def __post_init__(self):
        weights = (self.gt_weight, self.kd_weight)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise UserError(
                f"distillation: gt_weight is {self.gt_weight} and kd_weight {self.kd_weight}; expected numbers of at "
                "least 0, one of them above 0"
            )
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"distillation.temperature is {self.temperature}; expected a number above 0")

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.teacher = resolve_path(self.teacher, config_path)


class DistillationLoss(nn.Cell):
    """The weighted cross-entropy of the labels and the weighted divergence from the teacher, times the labels.

    The quotients by the number of labels are `gt_weight` times the mean cross-entropy over the labels, and `kd_weight`
    times T^2 times the mean divergence over all codes, or over those with a label if `masked`.

    The logits are computed chunk by chunk, forward and backward at once; see `NextTokenLoss`.

    Args:
        head: of the student; it may be divided over the tensor-parallel ranks.
        teacher_head: of the teacher, whole on every rank.
    """

    def __init__(self, config: DistillationConfig, head: Head, teacher_head: nn.Cell):
        super().__init__(auto_prefix=False)
        self.config = config
        self.heads = (head, teacher_head)
        self.is_divided = hasattr(head, "gather_columns")
        if self.is_divided and head.is_adapted:
            raise UserError("lora: a divided head with an adapter cannot be distilled; set parallel.tp to 1")
        self.matrix_trains = trains(head)
        self.logits = ops.MatMul(transpose_b=True)
        self.product = ops.MatMul()
        self.by_columns = ops.MatMul(transpose_a=True)
        self.tile = ops.Tile()
        self.known_gradient = KnownGradient()

    def construct(self, states, teacher_states, target, is_code):
        """Args:
            states: (N, hidden) of the student.
            teacher_states: (N, hidden') of the teacher.
            target: (N,) int32, -100 to ignore.
            is_code: (N,) float32, 0 at unused places of a row and 1 elsewhere.

        Returns:
            Both terms, (2,) float32, and the number of labels, a float32 scalar. The gradient of the sum of the terms
            is exact; the first term carries all of it.
        """
        if self.is_divided:
            matrix = self.heads[0].product.matrix(states)
        else:
            states, matrix = self.heads[0].factors(states)
        counted = (target != IGNORED_LABEL).astype(ms.float32)
        num_labels = counted.sum()
        shares = counted if self.config.masked else is_code * (num_labels / is_code.sum())
        gt, kd, states_gradient, matrix_gradient = self.by_chunks(
            ops.stop_gradient(states),
            ops.stop_gradient(matrix),
            ops.stop_gradient(teacher_states),
            ops.maximum(target, ops.zeros_like(target)).reshape((-1, 1)),
            counted.reshape((-1, 1)),
            shares.reshape((-1, 1)),
        )
        loss = self.known_gradient(ops.stop_gradient(gt), states, ops.stop_gradient(states_gradient))
        if self.matrix_trains:
            loss = self.known_gradient(loss, matrix, ops.stop_gradient(matrix_gradient))
        return ops.stack((loss, ops.stop_gradient(kd))), num_labels

    def by_chunks(self, states, matrix, teacher_states, target, counted, shares):
        """Returns both terms and the float32 gradients of states and matrix; see `chunk` for the last arguments."""
        gt, kd = Tensor(0.0, ms.float32), Tensor(0.0, ms.float32)
        parts, matrix_gradient = (), ops.zeros(matrix.shape if self.matrix_trains else (1,), ms.float32)
        for start, stop in chunks(states.shape[0], self.heads[1].out_features):
            # sequential, so only one chunk of logits is in memory
            part = ops.depend(states[start:stop], (gt, kd, matrix_gradient))
            added_gt, added_kd, gradient = self.chunk(
                self.student_logits(part, matrix),
                self.heads[1](ops.depend(teacher_states[start:stop], part)).astype(ms.float32),
                target[start:stop],
                counted[start:stop],
                shares[start:stop],
            )
            gradient = self.own_columns(gradient).astype(states.dtype)
            gt, kd = gt + added_gt, kd + added_kd
            parts = parts + (self.product(gradient, matrix).astype(ms.float32),)
            if self.matrix_trains:
                matrix_gradient = matrix_gradient + self.by_columns(gradient, part).astype(ms.float32)
        return gt, kd, parts[0] if len(parts) == 1 else ops.concat(parts, 0), matrix_gradient

    def chunk(self, logits, teacher_logits, target, counted, shares):
        """Returns both terms and the gradient of the logits (n, V).

        Args:
            logits, teacher_logits: (n, V) float32.
            target: (n, 1) int32, 0 where ignored.
            counted, shares: (n, 1) float32, the weights of a position in the first and in the second term.
        """
        config, factor = self.config, self.config.kd_weight * self.config.temperature
        log_probabilities = ops.log_softmax(logits, -1)
        picked = ops.gather_elements(log_probabilities, 1, target)
        gt = -config.gt_weight * (picked * counted).sum()
        gradient = ops.tensor_scatter_elements(ops.exp(log_probabilities), target, ops.exp(picked) - 1.0, 1)
        gradient = gradient * self.widen(counted * config.gt_weight, gradient)
        student = log_probabilities if config.temperature == 1 else ops.log_softmax(logits / config.temperature, -1)
        teacher = ops.log_softmax(teacher_logits / config.temperature, -1)
        if config.inverse:
            probabilities = ops.exp(student)
            difference = student - teacher
            divergence = (probabilities * difference).sum(-1, keepdims=True)
            change = probabilities * (difference - self.widen(divergence, difference))
        else:
            probabilities = ops.exp(teacher)
            divergence = (probabilities * (teacher - student)).sum(-1, keepdims=True)
            change = ops.exp(student) - probabilities
        kd = factor * config.temperature * (divergence * shares).sum()
        return gt, kd, gradient + change * self.widen(shares * factor, change)

    def widen(self, column, logits):
        """Tiles a column (n, 1) to the shape of logits (n, V); broadcasting keeps an index table for every chunk."""
        # after the logits: the columns of all chunks would be tiled at once
        return self.tile(ops.depend(column, logits), (1, logits.shape[1]))

    def student_logits(self, states, matrix):
        """Returns the logits over all codes, (n, V) float32."""
        logits = self.logits(states, matrix).astype(ms.float32)
        return self.heads[0].gather_columns(logits) if self.is_divided else logits

    def own_columns(self, gradient):
        """Returns the columns of a gradient (n, V) whose logits this rank computes."""
        return self.heads[0].gather_columns.own(gradient) if self.is_divided else gradient
