"""The resampler against torch's attention and bicubic resizing, and the gate of the global adapter."""

import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.slime.adapter import ADAPTERS, NORM_EPS, QueryResampler
from mindvlm.models.slime.positions import resize_matrix, sine_table

WIDTH, HIDDEN = 256, 24


def fill(cell, seed=0):
    rng = np.random.default_rng(seed)
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(rng.normal(0, 0.2, parameter.shape).astype(np.float32)))
    return {name: torch.tensor(parameter.asnumpy()) for name, parameter in cell.parameters_and_names()}


@pytest.mark.parametrize(("old", "new"), [(12, 24), (2, 4), (24, 16), (3, 7)])
def test_resizing_is_that_of_torch(old, new):
    table = sine_table(64, old)
    grid = torch.tensor(table).reshape(1, old, old, 64).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    found = resize_matrix(old, new) @ table
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0).reshape(new * new, 64), rtol=0, atol=2e-6)


def test_columns_come_before_lines():
    table = sine_table(1024, 12)
    assert table[1, 0] == pytest.approx(0.841471, abs=1e-6) and table[1, 512] == 0
    assert table[12, 0] == 0 and table[12, 512] == pytest.approx(0.841471, abs=1e-6)
    assert table[13, 255] == pytest.approx(1.04e-4, rel=1e-2) and table[13, 256] == pytest.approx(0.540302, abs=1e-6)


@pytest.mark.parametrize("num_queries", [4, 16])
def test_resampler(num_queries):
    cell = QueryResampler(WIDTH, num_queries, 16, EAGER_FLOAT32).set_train(False)
    own = fill(cell)
    x = np.random.default_rng(1).normal(size=(3, 16, WIDTH)).astype(np.float32)

    def norm(name, value):
        return torch.nn.functional.layer_norm(value, (WIDTH,), own[f"{name}.weight"], own[f"{name}.bias"], NORM_EPS)

    attention = torch.nn.MultiheadAttention(WIDTH, WIDTH // 128, batch_first=True)
    packed = {
        f"in_proj_{end}": torch.cat([own[f"attn.{name}_proj.{end}"] for name in "qkv"]) for end in ("weight", "bias")
    }
    attention.load_state_dict(packed | {f"out_proj.{end}": own[f"attn.out_proj.{end}"] for end in ("weight", "bias")})
    edge = int(num_queries**0.5)
    grid = own["pos_embed"].reshape(1, edge, edge, WIDTH).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    positions = resized[0].permute(1, 2, 0).reshape(16, WIDTH)
    value = norm("ln_kv", torch.tensor(x))
    query = (norm("ln_q", own["query"]) + own["pos_embed"]).expand(3, -1, -1)
    with torch.no_grad():
        expected = norm("ln_post", attention(query, value + positions, value)[0])
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def adapter(gate):
    cell = ADAPTERS[gate](WIDTH, HIDDEN, 16, EAGER_FLOAT32).set_train(False)
    fill(cell)
    return cell


def test_an_untrained_gate_mixes_equally_and_one_expert_may_stand_alone():
    x = Tensor(np.random.default_rng(1).normal(size=(2, 16, WIDTH)).astype(np.float32))
    learned = adapter("learned")
    first, second = (adapter(gate)(x).asnumpy() for gate in ("mlp", "resampler"))
    gates = learned.gates(x).asnumpy()
    assert gates.std() > 0.01
    np.testing.assert_allclose(gates.sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(
        learned(x).asnumpy(), gates[..., :1] * first + gates[..., 1:] * second, rtol=1e-4, atol=1e-5
    )
    learned.w_gate.set_data(Tensor(np.zeros((WIDTH, 2), np.float32)))
    np.testing.assert_allclose(learned(x).asnumpy(), (first + second) / 2, rtol=1e-4, atol=1e-4)


def test_fixed_parameters_do_not_train():
    frozen = {parameter.name for parameter in adapter("learned").get_parameters() if not parameter.requires_grad}
    assert {name.split(".")[-1] for name in frozen} == {"pos_embed"}
