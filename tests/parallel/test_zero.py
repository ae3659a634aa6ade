"""The divided AdamW on one replica: the numbers of the plain one, master copies, state by parameter."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.core import runtime
from mindvlm.parallel.buckets import make_buckets
from mindvlm.parallel.gradients import GradientSync
from mindvlm.parallel.host import HostGather
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.parallel.state import fill_masters, full_optimizer_state, load_optimizer_state
from mindvlm.parallel.zero import ShardedAdamW
from mindvlm.training.optimizer import AdamW, OptimizerConfig

SHAPES = {"a.weight": (3, 5), "a.bias": (3,), "norm.weight": (5,), "b.weight": (4, 3)}


@pytest.fixture(autouse=True, scope="module")
def graph_mode():
    runtime.start(runtime.RuntimeConfig(device="cpu"))


class Update(nn.Cell):
    """Gradients, each an argument (a tuple would be a constant of the graph) -> their norm, after the update."""

    def __init__(self, sync: nn.Cell, optimizer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.sync = sync
        self.optimizer = optimizer

    def construct(self, learning_rate, *gradients):
        synced = self.sync(gradients)
        return ops.depend(self.sync.norm(synced), self.optimizer(synced, learning_rate))


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def make(config: OptimizerConfig, dtype=ms.float32, *, takes_chunks: bool = False):
    parameters = [Parameter(Tensor(array, dtype), name=name) for name, array in values(0).items()]
    decays = [config.decays(name) for name in SHAPES]
    buckets = make_buckets(parameters, decays=decays, is_divided=[False] * len(SHAPES), mesh=Mesh(), max_elements=20)
    sync = GradientSync(parameters, buckets, Mesh(), keep_chunks=takes_chunks)
    optimizer = ShardedAdamW(parameters, buckets, config, Mesh(), takes_chunks=takes_chunks)
    return parameters, Update(sync, optimizer), optimizer


def gradients(seed: int) -> tuple[Tensor, ...]:
    return tuple(Tensor(array) for array in values(seed).values())


@pytest.mark.parametrize("takes_chunks", [False, True])
@pytest.mark.parametrize(
    "options", [{"bias_correction": True}, {"bias_correction": False}, {"betas": [0.9, 0.3], "beta2_power": 0.8}]
)
def test_updates_are_those_of_the_plain_optimizer(takes_chunks, options):
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, **options)
    parameters, update, _ = make(config, takes_chunks=takes_chunks)
    expected = [Parameter(Tensor(array), name=name) for name, array in values(0).items()]
    plain = AdamW(expected, config)
    for seed in range(1, 5):
        norm = np.sqrt(sum((array**2).sum() for array in values(seed).values()))
        np.testing.assert_allclose(update(Tensor(0.01, ms.float32), *gradients(seed)).asnumpy(), norm, rtol=1e-6)
        plain(gradients(seed), Tensor(0.01, ms.float32))
    for ours, theirs in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-6, atol=1e-6)


def test_small_updates_of_16_bit_weights_gather_in_the_master_copy():
    config = OptimizerConfig(learning_rate=1e-5)
    parameters, update, optimizer = make(config, ms.float16)
    fill_masters(optimizer, Mesh())
    start = dict(values(0))
    for _ in range(100):
        update(Tensor(1e-5, ms.float32), *gradients(1))
    state = dict(full_optimizer_state(optimizer, {}, HostGather(Mesh())))
    for parameter in parameters:
        # every step of 1e-5 alone would round away against weights near 1
        wanted = start[parameter.name].astype(np.float16).astype(np.float32) - 1e-3 * np.sign(values(1)[parameter.name])
        np.testing.assert_allclose(state[f"master.{parameter.name}"], wanted, atol=2e-5)
        np.testing.assert_array_equal(parameter.asnumpy(), state[f"master.{parameter.name}"].astype(np.float16))


def test_state_goes_to_names_and_back():
    config = OptimizerConfig(learning_rate=0.01)
    _, update, optimizer = make(config)
    update(Tensor(0.01, ms.float32), *gradients(1))
    state = dict(full_optimizer_state(optimizer, {}, HostGather(Mesh())))
    np.testing.assert_allclose(state["moment1.a.weight"], 0.1 * values(1)["a.weight"], rtol=1e-5)
    # 1 - 0.999 in float32
    np.testing.assert_allclose(state["moment2.b.weight"], 0.00099998713 * values(1)["b.weight"] ** 2, rtol=1e-5)
    _, _, other = make(config)
    load_optimizer_state(other, {}, Mesh(), state.__getitem__)
    for ours, theirs in zip((*other.moment1, *other.moment2), (*optimizer.moment1, *optimizer.moment2), strict=True):
        np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())


def test_divided_parameters_take_their_part_of_the_full_state():
    config = OptimizerConfig(learning_rate=0.01)
    _, _, optimizer = make(config)
    full = {name: array for kind in ("moment1", "moment2") for name, array in prefixed(kind, values(2)).items()}
    double = np.concatenate([full["moment1.b.weight"], full["moment1.b.weight"] + 1])
    full["moment1.b.weight"] = full["moment2.b.weight"] = double
    specs = {"b.weight": ShardSpec(axis=0, index=1, count=2)}
    load_optimizer_state(optimizer, specs, Mesh(), full.__getitem__)
    state = dict(full_optimizer_state(optimizer, {}, HostGather(Mesh())))
    np.testing.assert_array_equal(state["moment1.b.weight"], double[4:])


def prefixed(kind: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{kind}.{name}": array for name, array in arrays.items()}
