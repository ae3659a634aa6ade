"""The optimizer step of the trainer: NumPy arrays in, Python numbers out."""

import math
from dataclasses import dataclass, field

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from mindvlm.models.own_training import PassInputs
from mindvlm.nn.dropout import place_dropout
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.parallel.zero import ShardedAdamW
from mindvlm.training.config import TrainConfig
from mindvlm.training.step import StepResult, TrainStep, loss_terms


@dataclass(frozen=True)
class Outcome:
    """Result of a step.

    Attributes:
        loss: mean over all ranks and passes.
        norm: norm of the gradients before clipping.
        is_finite: false if a gradient was not finite; then nothing was updated.
        is_overflow: whether the loss scale was too large; it has been lowered.
        has_labels: false if no row of any rank had a label; then nothing was updated, and loss and norm are 0.
        terms: the terms of the loss by name, if the model has several.
    """

    loss: float
    norm: float
    is_finite: bool = True
    is_overflow: bool = False
    has_labels: bool = True
    terms: dict[str, float] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether loss and norm are figures of the run."""
        return self.is_finite and self.has_labels


def model_arguments(inputs: PassInputs, inv_freq: Tensor | None, dtype) -> tuple[Tensor, ...]:
    """Converts a pass to the arguments of a model with that dtype; an array used twice becomes one Tensor.

    Args:
        inv_freq: follows the labels; None for a model without decoder.
    """
    floats = {id(array): Tensor(array, dtype) for array in inputs.arrays.values() if array.dtype.kind == "f"}
    arguments = []
    for name, array in inputs.arrays.items():
        arguments.append(floats[id(array)] if id(array) in floats else Tensor(array))
        if name == "labels" and inv_freq is not None:
            arguments.append(inv_freq)
    return tuple(arguments)


class StepRunner:
    """Runs the passes of a step and its update.

    Args:
        model: the Cell to train.
        config: config of the job.
        inv_freq: (D/2,) float32, rotary frequencies of the decoder; None without decoder.
        mesh: the mesh of this process.
        divided: the parts of the divided model.
        dtype: dtype of the model; float16 gets a loss scale.
    """

    def __init__(
        self,
        model: nn.Cell,
        config: TrainConfig,
        *,
        inv_freq: Tensor | None,
        mesh: Mesh,
        divided: ParallelModel,
        dtype=ms.float32,
    ):
        self.inv_freq = inv_freq
        self.dtype = dtype
        self.num_passes = config.num_passes
        self.accumulates = self.num_passes > 1
        self.has_loss_scale = dtype == ms.float16
        self.loss_terms = loss_terms(model)
        place_dropout(model, num_passes=self.num_passes, num_replicas=mesh.dp, replica=mesh.dp_rank)
        self.step = TrainStep(
            model,
            config.optimizer,
            accumulates=self.accumulates,
            loss_scale=config.loss_scale if self.has_loss_scale else None,
            parallel=config.parallel,
            mesh=mesh,
            divided=divided,
            recompute=config.recompute,
            averages_passes=config.averages_passes,
        )

    def run(self, learning_rate: float, passes: list[PassInputs]) -> Outcome:
        """Runs one update."""
        rate = Tensor(learning_rate, ms.float32)
        if self.accumulates:
            for inputs in passes:
                self.step.accumulate(*self.arguments(inputs))
            result = self.step.update(rate)
        else:
            result = self.step(rate, *self.arguments(passes[0]))
        return self.outcome(result)

    def outcome(self, result: StepResult) -> Outcome:
        losses = result.loss.asnumpy()
        terms = dict(zip(self.loss_terms, losses.reshape(-1).tolist(), strict=True)) if self.loss_terms else {}
        loss, (norm, num_labels, is_finite) = float(losses.sum()), (value.asnumpy().item() for value in result[1:])
        is_overflow = self.has_loss_scale and not is_finite and math.isfinite(loss) and not self.scale_is_lowest()
        return Outcome(loss, norm, is_finite, is_overflow, has_labels=num_labels > 0, terms=terms)

    def scale_is_lowest(self) -> bool:
        """Whether the loss scale has its minimum value."""
        return self.step.loss_scale.value.asnumpy().item() <= self.step.loss_scale.minimum

    def arguments(self, inputs: PassInputs) -> tuple[Tensor, ...]:
        """See `model_arguments`."""
        return model_arguments(inputs, self.inv_freq, self.dtype)

    def start_at(self, step: int) -> None:
        """Resumes as if `step` steps had run."""
        self.step.set_num_passes(step * self.num_passes)

    @property
    def optimizer_state(self) -> dict[str, Parameter]:
        """The state in a checkpoint besides the weights, by name."""
        return self.step.state

    @property
    def sharded(self) -> ShardedAdamW | None:
        """The optimizer, if its state is divided over the replicas."""
        return self.step.optimizer if self.step.is_sharded else None

    def fill_masters(self) -> None:
        """Copies the filled 16-bit weights of a new run to their float32 copies."""
        self.step.fill_masters()
