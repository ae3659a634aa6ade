"""A decoder of a few thousand weights and its training on any mesh."""

import zlib
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource, open_checkpoint
from mindvlm.checkpoint.safetensors_format import write_safetensors
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.loss import IGNORED_LABEL
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.parallel import buckets
from mindvlm.parallel.host import HostGather
from mindvlm.parallel.mesh import Mesh, ParallelConfig
from mindvlm.parallel.plan import DECODER, apply_tensor_parallel
from mindvlm.parallel.sharding import ShardSpec, read_shard
from mindvlm.parallel.state import full_optimizer_state, join_parts, load_optimizer_state, to_array
from mindvlm.parallel.zero import ShardedAdamW
from mindvlm.training.optimizer import AdamW, OptimizerConfig
from mindvlm.training.step import TrainStep

BATCH_SIZE, LENGTH, LEARNING_RATE = 4, 12, 2e-3
UNLABELLED_ROWS = {12: slice(2, None), 14: slice(None)}
# several buckets, though the model is tiny
buckets.MAX_BUCKET_ELEMENTS = 1000
SIZES = dict(vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, head_dim=4)
CONFIGS = {
    "qwen": DecoderConfig(**SIZES, intermediate_size=24),
    "opt": DecoderConfig(
        **SIZES,
        intermediate_size=24,
        norm="layer_norm",
        position="learned",
        max_position_embeddings=LENGTH,
        mlp="plain",
        hidden_act="relu",
        o_bias=True,
        tie_word_embeddings=True,
    ),
    # as TinyLLaVA Factory's, whose head has a bias
    "phi": DecoderConfig(
        **SIZES,
        intermediate_size=24,
        norm="layer_norm",
        residual="parallel",
        partial_rotary_factor=0.5,
        mlp="plain",
        hidden_act="gelu_new",
        qkv_bias=True,
        o_bias=True,
        head_bias=True,
        use_dynamic_ntk=False,
        use_logn_attn=False,
    ),
}
# Without a rotation the key biases have no gradient but rounding errors; a larger eps keeps AdamW from amplifying them.
OPTIMIZER = OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.1, eps=1e-5, max_grad_norm=0.5)


class TinyModel(nn.Cell):
    """ids, labels (B, L) int32 -> sum of the token losses, their number."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.language_model = CausalLM(config)

    def construct(self, ids, labels, inv_freq):
        states = self.language_model(self.language_model.embed_tokens(ids), inv_freq)
        return self.language_model.lm_head.loss_sum(states, labels)


class TinyTraining:
    """A model on a mesh, ready to train; weights and batches depend on names and numbers alone.

    Args:
        num_passes: of a step, which divide a replica's rows.
    """

    def __init__(self, dialect: str, parallel: ParallelConfig, mesh: Mesh, *, num_passes: int = 1):
        self.mesh, self.num_passes = mesh, num_passes
        config = CONFIGS[dialect]
        self.model = TinyModel(config)
        self.divided = apply_tensor_parallel(self.model, DECODER, mesh)
        for parameter in self.model.get_parameters():
            parameter.set_data(Tensor(self.initial(parameter)))
        self.model.set_train()
        self.step = TrainStep(
            self.model, OPTIMIZER, accumulates=num_passes > 1, parallel=parallel, mesh=mesh, divided=self.divided
        )
        self.inv_freq = Tensor(inverse_frequencies(config.head_dim, config.rope_theta))

    def initial(self, parameter: ms.Parameter) -> np.ndarray:
        spec = self.divided.specs.get(parameter.name)
        shape = tuple(parameter.shape) if spec is None else spec.full_shape(tuple(parameter.shape))
        values = np.random.default_rng(zlib.crc32(parameter.name.encode())).standard_normal(shape) * 0.3
        values = (values + ("norm" in parameter.name)).astype(np.float32)
        return values if spec is None else spec.take(values)

    def run(self, first: int, last: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of the steps [first, last)."""
        results = []
        for number in range(first, last):
            ids, labels = batch(number)
            rate = Tensor(LEARNING_RATE * (1 + number % 3), ms.float32)
            size = BATCH_SIZE // self.mesh.dp // self.num_passes
            first_row = self.mesh.dp_rank * BATCH_SIZE // self.mesh.dp
            passes = [slice(first_row + i * size, first_row + (i + 1) * size) for i in range(self.num_passes)]
            if self.num_passes == 1:
                loss, norm, *_ = self.step(rate, Tensor(ids[passes[0]]), Tensor(labels[passes[0]]), self.inv_freq)
            else:
                for rows in passes:
                    self.step.accumulate(Tensor(ids[rows]), Tensor(labels[rows]), self.inv_freq)
                loss, norm, *_ = self.step.update(rate)
            results.append((float(loss.asnumpy()), float(norm.asnumpy())))
        return results

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments in this process."""
        return sum(p.nbytes for kind in (self.optimizer.moment1, self.optimizer.moment2) for p in kind)

    @property
    def optimizer(self) -> AdamW | ShardedAdamW:
        return self.step.optimizer

    def undivided_state(self) -> list[ms.Parameter]:
        """The moments of an optimizer that every replica holds, under the names they have in files."""
        named = []
        for kind in ("moment1", "moment2"):
            for parameter, moment in zip(self.optimizer.parameters, getattr(self.optimizer, kind), strict=True):
                moment.name = f"{kind}.{parameter.name}"
                named.append(moment)
        return named

    def save(self, path: Path) -> None:
        """Full weights and optimizer state; every rank takes part, the first one writes."""
        host = HostGather(self.mesh)
        tensors = full_weights(self.model.get_parameters(), self.divided.specs, host)
        if isinstance(self.optimizer, ShardedAdamW):
            tensors.update(full_optimizer_state(self.optimizer, self.divided.specs, host))
        else:
            tensors.update(full_weights(self.undivided_state(), self.state_specs, host))
        tensors["num_updates"] = self.optimizer.num_updates.asnumpy().reshape((1,))
        if self.mesh.is_first:
            write_safetensors(path, MemorySource(tensors), metadata={})

    def load(self, path: Path) -> None:
        """The rank's part of what any layout saved."""
        with open_checkpoint(path) as source:
            for parameter in self.model.get_parameters():
                part = read_shard(source, parameter.name, self.divided.specs.get(parameter.name))
                parameter.set_data(Tensor(part))
            if isinstance(self.optimizer, ShardedAdamW):
                load_optimizer_state(self.optimizer, self.divided.specs, self.mesh, lambda name: source.read(name).data)
            else:
                for moment in self.undivided_state():
                    moment.set_data(Tensor(read_shard(source, moment.name, self.state_specs.get(moment.name))))
            self.optimizer.num_updates.set_data(Tensor(source.read("num_updates").data[0]))

    @property
    def state_specs(self) -> dict[str, ShardSpec]:
        return {f"{kind}.{name}": s for kind in ("moment1", "moment2") for name, s in self.divided.specs.items()}


def full_weights(parameters, specs: dict, host: HostGather) -> dict[str, np.ndarray]:
    """Name and full float32 array of each parameter."""
    return {one.name: join_parts(one.name, to_array(one), specs, host) for one in parameters}


def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of step `number`; the rows have 2, 4, 7 and 11 labels, so that replicas must be weighted.

    In one step a replica has no labels, and in another one nobody has any.
    """
    ids = np.random.default_rng(number).integers(0, SIZES["vocab_size"], (BATCH_SIZE, LENGTH)).astype(np.int32)
    labels = ids.copy()
    for row, num_labels in enumerate((2, 4, 7, 11)):
        labels[row, : LENGTH - num_labels] = IGNORED_LABEL
    if number in UNLABELLED_ROWS:
        labels[UNLABELLED_ROWS[number]] = IGNORED_LABEL
    return ids, labels
