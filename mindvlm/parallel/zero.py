"""AdamW whose state is divided over the replicas (ZeRO, arXiv 1910.02054)."""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.parallel.buckets import Bucket
from mindvlm.parallel.collectives import PlaceAmongRanks, SumOver, over_group
from mindvlm.parallel.mesh import Mesh


def scheduled_beta2(beta2, power: float, num_updates):
    """Returns AdamW's second beta after `num_updates` updates, max(beta2, 1 - num_updates^-power); power 0: constant.

    InternLM's Beta2Scheduler (arXiv 1804.04235 has the formula).
    """
    if power == 0:
        return beta2
    return ops.maximum(beta2, 1.0 - ops.pow(ops.maximum(num_updates, Tensor(1.0, ms.float32)), -power))


class GatherChunks(nn.Cell):
    """This replica's chunk of a bucket -> all replicas' chunks: (chunk_size,) -> (dp * chunk_size,)."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.has_all_gather = mesh.device == "Ascend" and mesh.dp > 1
        if self.has_all_gather:
            self.all_gather = ops.AllGather(mesh.dp_group)
        else:
            self.place = PlaceAmongRanks(mesh.dp_rank, mesh.dp)
            self.sum = over_group(SumOver, mesh.dp_group, mesh.dp)

    def construct(self, chunk):
        if self.has_all_gather:
            return self.all_gather(chunk)
        return self.sum(self.place(chunk)).reshape((-1,))


class ShardedAdamW(nn.Cell):
    """Computes the update of `mindvlm.training.optimizer.AdamW` with 1 / dp of its state on each replica.

    Each replica updates its chunk of every bucket; then the replicas exchange the updated parameters. Buckets with
    parameters that are not float32 have a float32 master copy, divided like the moments; `state.fill_masters` fills it.

    Args:
        parameters: the parameters to update.
        buckets: the buckets of these parameters, which also say which of them decay.
        config: an `OptimizerConfig`.
        mesh: this process's mesh.
        takes_chunks: gradients come as chunks (ZeRO-2) instead of whole (ZeRO-1).
    """

    def __init__(self, parameters: list[Parameter], buckets: nn.CellList, config, mesh: Mesh, *, takes_chunks: bool):
        super().__init__(auto_prefix=False)
        self.parameters = ms.ParameterTuple(parameters)
        self.buckets = buckets
        self.takes_chunks = takes_chunks
        self.moment1 = ms.ParameterTuple([chunk_state(bucket, f"moment1.{k}") for k, bucket in enumerate(buckets)])
        self.moment2 = ms.ParameterTuple([chunk_state(bucket, f"moment2.{k}") for k, bucket in enumerate(buckets)])
        self.has_master = tuple(any(dtype != ms.float32 for dtype in bucket.dtypes) for bucket in buckets)
        self.master = ms.ParameterTuple(
            [chunk_state(b, f"master.{k}", is_empty=not self.has_master[k]) for k, b in enumerate(buckets)]
        )
        self.num_updates = Parameter(Tensor(0, ms.float32), name="num_updates", requires_grad=False)
        self.weight_decay = config.weight_decay
        self.eps = config.eps
        self.bias_correction = config.bias_correction
        self.beta1 = Tensor(config.betas[0], ms.float32)
        self.beta2 = Tensor(config.betas[1], ms.float32)
        self.beta2_power = config.beta2_power
        self.gather = GatherChunks(mesh)

    def construct(self, gradients, learning_rate, scale=1.0):
        """One update.

        Args:
            gradients: whole in the order of the parameters, or chunks in the order of the buckets.
            learning_rate: float32 scalar.
            scale: multiplies the gradients.
        """
        count = self.num_updates + 1.0
        beta2 = scheduled_beta2(self.beta2, self.beta2_power, self.num_updates)
        corrections = self.corrections(count, beta2)
        done = count
        for k in range(len(self.buckets)):
            bucket = self.buckets[k]
            # one bucket after another, so that only one bucket's buffers are in memory
            if self.takes_chunks:
                gradient = ops.depend(gradients[k], done)
            else:
                gradient = bucket.own_chunk(ops.depend(bucket.flatten(gradients), done))
            if self.has_master[k]:
                chunk = self.master[k]
            else:
                chunk = bucket.own_chunk(bucket.flatten(self.parameters))
            rate = learning_rate * bucket.learning_rate_factor
            if bucket.decays:
                chunk = chunk * (1.0 - rate * self.weight_decay)
            new_chunk = chunk - self.step(k, gradient * scale, rate, beta2, corrections)
            if self.has_master[k]:
                done = ops.depend(done, ops.assign(self.master[k], new_chunk))
            values = bucket.unflatten(self.gather(new_chunk))
            for j in range(len(bucket.indices)):
                done = ops.depend(done, ops.assign(self.parameters[bucket.indices[j]], values[j]))
        return ops.assign(self.num_updates, done)

    def corrections(self, count, beta2):
        """Bias corrections 1 / (1 - beta1^t) and sqrt(1 - beta2^t)."""
        if not self.bias_correction:
            return ops.ones_like(count), ops.ones_like(count)
        return 1.0 / (1.0 - ops.pow(self.beta1, count)), ops.sqrt(1.0 - ops.pow(beta2, count))

    def step(self, k, gradient, learning_rate, beta2, corrections):
        """Updates the moments of bucket k and returns the amount to subtract from its chunk."""
        first, second = corrections
        moment1 = self.moment1[k] + (gradient - self.moment1[k]) * (1.0 - self.beta1)
        moment2 = self.moment2[k] + (gradient * gradient - self.moment2[k]) * (1.0 - beta2)
        moment1 = ops.depend(moment1, ops.assign(self.moment1[k], moment1))
        moment2 = ops.depend(moment2, ops.assign(self.moment2[k], moment2))
        return moment1 * (learning_rate * first * second) / (ops.sqrt(moment2) + self.eps * second)


def chunk_state(bucket: Bucket, name: str, *, is_empty: bool = False) -> Parameter:
    """A zero Parameter for a bucket's chunk; of one element if it is not used."""
    zeros = initializer("zeros", (1 if is_empty else bucket.chunk_size,), ms.float32)
    return Parameter(zeros, name=name, requires_grad=False)
