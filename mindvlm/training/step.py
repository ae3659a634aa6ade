"""One training step: forward, backward, clip and update, in one compiled graph or over several passes."""

from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.nn.dropout import dropout_counter
from mindvlm.nn.norm import layer_norm_parameters
from mindvlm.parallel.buckets import make_buckets
from mindvlm.parallel.gradients import GradientSync, sum_of_squares
from mindvlm.parallel.mesh import Mesh, ParallelConfig
from mindvlm.parallel.plan import ParallelModel
from mindvlm.parallel.state import fill_masters
from mindvlm.parallel.zero import ShardedAdamW
from mindvlm.training.gradients import PassGradients
from mindvlm.training.loss import LossScale, LossScaleConfig
from mindvlm.training.optimizer import AdamW, OptimizerConfig


class StepResult(NamedTuple):
    """Result of a step as scalar Tensors, equal on all ranks.

    Attributes:
        loss: mean over the step, float32; its terms, (n,), if the model has `loss_terms`.
        norm: norm of the gradient of that mean, before clipping.
        num_labels: number of labels, float32; the number of passes with labels if these are averaged. If it is 0,
            nothing was updated.
        is_finite: false if the loss or a gradient was not finite; then nothing was updated.
    """

    loss: Tensor
    norm: Tensor
    num_labels: Tensor
    is_finite: Tensor


class TrainStep:
    """Trains a model whose `construct` returns the sum of its token losses and their number.

    A model with `loss_terms`, names of the terms of its loss, returns them as a vector whose sum trains.

    The loss of a step is the mean over all labels of all passes and replicas; with `averages_passes` it is the mean of
    the means of all passes and replicas. Call the object with (learning_rate, *batch) for a step of one pass, or
    `accumulate(*batch)` once per pass and then `update(learning_rate)`.

    Args:
        model: the Cell to train, in training mode, with or without filled weights; parameters with `requires_grad` are
            updated.
        config: config of the optimizer.
        accumulates: creates the buffers and graphs for several passes per step instead of a single graph.
        loss_scale: scales the loss, for float16.
        parallel: how the processes share the work.
        mesh: the mesh of this process.
        divided: the parts of the divided model.
        recompute: see `RecomputedGradients`; the model must be an `ImageTextModel`.
        averages_passes: every pass of every replica that has labels has the same weight, whatever their number.

    Attributes:
        optimizer: an `AdamW`, or a `ShardedAdamW` with ZeRO.
        graph: the Cell of a step of one pass, (learning_rate, *batch) -> a tuple as `StepResult`; None with
            `accumulates`.
    """

    def __init__(
        self,
        model: nn.Cell,
        config: OptimizerConfig,
        *,
        accumulates: bool = False,
        loss_scale: LossScaleConfig | None = None,
        parallel: ParallelConfig | None = None,
        mesh: Mesh | None = None,
        divided: ParallelModel | None = None,
        recompute: bool = False,
        averages_passes: bool = False,
    ):
        parallel, mesh, divided = parallel or ParallelConfig(), mesh or Mesh(), divided or ParallelModel()
        self.mesh = mesh
        parameters = list(model.trainable_params())
        layer_norms = layer_norm_parameters(model)
        self.loss_scale = LossScale(loss_scale) if loss_scale else None
        self.num_passes = dropout_counter(model)
        sync = None
        if parallel.zero or mesh.dp * mesh.tp > 1:
            buckets = make_buckets(
                parameters,
                decays=[config.decays(p.name, layer_norms) for p in parameters],
                is_divided=[p.name in divided.specs for p in parameters],
                mesh=mesh,
                learning_rate_factors=[config.learning_rate_factor(p.name) for p in parameters],
            )
            takes_chunks = parallel.zero == 2
            sync = GradientSync(parameters, buckets, mesh, partial=divided.partial, keep_chunks=takes_chunks)
        if parallel.zero:
            self.optimizer = ShardedAdamW(parameters, buckets, config, mesh, takes_chunks=takes_chunks)
        else:
            self.optimizer = AdamW(parameters, config, layer_norms=layer_norms)
        options = {"recompute": recompute, "averages": averages_passes}
        gradients = PassGradients(model, parameters, self.loss_scale, self.num_passes, **options)
        update = Update(self.optimizer, sync, self.loss_scale, config.max_grad_norm)
        self.graph = self.accumulate_graph = self.update_graph = None
        if accumulates:
            self.accumulate_graph = Accumulate(gradients, parameters, sync, num_terms=len(loss_terms(model)))
            self.update_graph = UpdateFromBuffers(update, self.accumulate_graph)
        else:
            self.graph = OneGraphStep(gradients, update)

    def __call__(self, learning_rate: Tensor, *batch: Tensor) -> StepResult:
        """Runs a step of one pass; learning_rate is a float32 scalar, batch the arguments of the model."""
        return StepResult(*self.graph(learning_rate, *batch))

    def compile(self, learning_rate: Tensor, *batch: Tensor) -> None:
        """Compiles for these shapes without running; otherwise `__call__` compiles."""
        if self.graph is not None:
            self.graph.compile(learning_rate, *batch)
        else:
            self.accumulate_graph.compile(*batch)
            self.update_graph.compile(learning_rate)

    def accumulate(self, *batch: Tensor) -> None:
        """Adds the gradients of one pass to the buffers."""
        self.accumulate_graph(*batch)

    def update(self, learning_rate: Tensor) -> StepResult:
        """Updates from the buffers and resets them."""
        return StepResult(*self.update_graph(learning_rate))

    @property
    def is_sharded(self) -> bool:
        """Whether the optimizer's state is divided over the replicas; `mindvlm.parallel.state` reads and writes it."""
        return isinstance(self.optimizer, ShardedAdamW)

    @property
    def state(self) -> dict[str, Parameter]:
        """The state in a checkpoint besides the weights and a divided optimizer's state, by name."""
        state = {"num_updates": self.optimizer.num_updates} if self.is_sharded else dict(self.optimizer.state)
        if self.loss_scale:
            state |= self.loss_scale.state
        return state

    def set_num_passes(self, count: int) -> None:
        """Resumes as if `count` passes had run; the dropout masks depend on that number."""
        if self.num_passes is not None:
            self.num_passes.set_data(Tensor(count, ms.int32))

    def fill_masters(self) -> None:
        """Copies the filled 16-bit weights of a new run to their float32 copies."""
        if self.is_sharded:
            fill_masters(self.optimizer, self.mesh)
        else:
            self.optimizer.fill_masters()


class Update(nn.Cell):
    """Summed loss, number of labels, gradients, learning rate -> a tuple as `StepResult`, after the update."""

    def __init__(
        self, optimizer: nn.Cell, sync: GradientSync | None, scale: LossScale | None, max_grad_norm: float | None
    ):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.sync = sync
        self.scale = scale
        self.max_grad_norm = max_grad_norm
        # compiles ten times faster than a loop
        self.for_all = ops.HyperMap()

    def construct(self, loss, num_labels, gradients, learning_rate):
        """Runs the update; gradients have the form returned by `GradientSync`, if there is one."""
        if self.sync is not None:
            loss, num_labels, norm = self.sync.total(loss), self.sync.total(num_labels), self.sync.norm(gradients)
        else:
            norm = ops.sqrt(ops.addn(self.for_all(square, gradients)))
        # a copy: accumulated numbers are reset after the update
        num_labels = ops.abs(num_labels)
        divisor = ops.maximum(num_labels, ops.ones_like(num_labels))
        scale = 1.0 / divisor if self.scale is None else 1.0 / (divisor * self.scale.value)
        norm = norm * scale
        is_finite = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss.sum()))
        if self.max_grad_norm is not None:
            scale = scale * ops.minimum(self.max_grad_norm / (norm + 1e-6), ops.ones_like(norm))
        result = norm
        # without labels, weight decay and the moments would still change the parameters
        if ops.logical_and(is_finite, num_labels > 0):
            result = ops.depend(norm, self.optimizer(gradients, learning_rate, scale))
        if self.scale is not None:
            result = ops.depend(result, self.scale(ops.depend(is_finite, result)))
        return loss / divisor, result, num_labels, is_finite


square = ops.MultitypeFuncGraph("square")


@square.register("Tensor")
def _square(gradient):
    return sum_of_squares(gradient)


class OneGraphStep(nn.Cell):
    """(learning_rate, *batch) -> a tuple as `StepResult`."""

    def __init__(self, gradients: PassGradients, update: Update):
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.update = update

    def construct(self, learning_rate, *batch):
        loss, num_labels, gradients = self.gradients(*batch)
        if self.update.sync is not None:
            gradients = self.update.sync(gradients)
        return self.update(loss, num_labels, gradients, learning_rate)


class Accumulate(nn.Cell):
    """Adds a pass to float32 buffers: whole gradients, or with ZeRO-2 this replica's chunks of their sum.

    Args:
        num_terms: number of terms of the loss; 0 if it is a scalar.
    """

    def __init__(
        self, gradients: PassGradients, parameters: list[Parameter], sync: GradientSync | None, *, num_terms: int = 0
    ):
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.sync = sync if sync is not None and sync.keep_chunks else None
        if self.sync is not None:
            shapes = {f"gradient.{k}": (bucket.chunk_size,) for k, bucket in enumerate(sync.buckets)}
        else:
            shapes = {f"gradient.{parameter.name}": parameter.shape for parameter in parameters}
        self.buffers = ms.ParameterTuple([zero_state(name, shape) for name, shape in shapes.items()])
        self.loss = zero_state("gradient.loss", (num_terms,) if num_terms else ())
        self.num_labels = zero_state("gradient.num_labels", ())

    def construct(self, *batch):
        loss, num_labels, gradients = self.gradients(*batch)
        if self.sync is not None:
            gradients = self.sync(gradients)
        done = ops.assign_add(self.loss, loss)
        done = ops.depend(ops.assign_add(self.num_labels, num_labels), done)
        for i in range(len(self.buffers)):
            done = ops.depend(ops.assign_add(self.buffers[i], gradients[i].astype(ms.float32)), done)
        return done


class UpdateFromBuffers(nn.Cell):
    """learning_rate -> a tuple as `StepResult`; resets the buffers of `Accumulate` to zero."""

    def __init__(self, update: Update, passes: Accumulate):
        super().__init__(auto_prefix=False)
        self.update = update
        self.buffers = passes.buffers
        self.loss = passes.loss
        self.num_labels = passes.num_labels
        self.has_chunks = passes.sync is not None

    def construct(self, learning_rate):
        gradients = ()
        for buffer in self.buffers:
            gradients = gradients + (buffer,)
        if self.update.sync is not None and not self.has_chunks:
            gradients = self.update.sync(gradients)
        loss, norm, num_labels, is_finite = self.update(self.loss, self.num_labels, gradients, learning_rate)
        done = ops.depend(norm, (loss, num_labels, is_finite))
        for buffer in (*self.buffers, self.loss, self.num_labels):
            done = ops.depend(done, ops.assign(buffer, ops.depend(ops.zeros_like(buffer), done)))
        return loss, ops.depend(norm, done), num_labels, is_finite


def loss_terms(model: nn.Cell) -> tuple[str, ...]:
    """Returns the names of the terms of a model's loss; none if the loss is a scalar."""
    return getattr(model, "loss_terms", ())


def zero_state(name: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(initializer("zeros", shape, ms.float32), name=name, requires_grad=False)
