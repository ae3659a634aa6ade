"""The distillation loss: its terms, its gradients, and its chunks."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.core.errors import UserError
from mindvlm.models.delvm import distillation
from mindvlm.models.delvm.distillation import DistillationConfig, DistillationLoss
from mindvlm.nn.linear import Head

pytestmark = pytest.mark.usefixtures("pynative")

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 12, 5, 7, 30
OPTIONS = (
    {},
    {"temperature": 2.0, "gt_weight": 0.7, "kd_weight": 0.3},
    {"masked": True, "temperature": 3.0},
    {"inverse": True, "masked": True, "temperature": 0.5},
    {"inverse": True, "gt_weight": 0.0, "kd_weight": 2.0},
)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"states": (ROWS, WIDTH), "matrix": (VOCAB, WIDTH)}
    shapes |= {"teacher_states": (ROWS, TEACHER_WIDTH), "teacher_matrix": (VOCAB, TEACHER_WIDTH)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    target = rng.integers(0, VOCAB, ROWS).astype(np.int32)
    target[[1, 5, 6]] = -100
    is_code = np.ones(ROWS, np.float32)
    # an unused place has no label
    is_code[5] = 0
    return found | {"target": target, "is_code": is_code}


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expected(values: dict[str, np.ndarray], config: DistillationConfig) -> tuple[float, float]:
    """Returns both terms of a pass by their definition, in float64."""
    wide = {name: array.astype(np.float64) for name, array in values.items()}
    student, teacher = wide["states"] @ wide["matrix"].T, wide["teacher_states"] @ wide["teacher_matrix"].T
    counted = values["target"] >= 0
    rows = np.arange(ROWS)[counted]
    gt = -log_softmax(student)[rows, values["target"][counted]].mean()
    one, other = log_softmax(teacher / config.temperature), log_softmax(student / config.temperature)
    if config.inverse:
        one, other = other, one
    divergence = (np.exp(one) * (one - other)).sum(-1)
    kd = divergence[counted].mean() if config.masked else divergence[values["is_code"] > 0].mean()
    return config.gt_weight * gt, config.kd_weight * config.temperature**2 * kd


def computed(values: dict[str, np.ndarray], config: DistillationConfig, *, dtype=ms.float32):
    """Returns both terms, the number of labels, and the gradients of states and matrix of the sum of the terms."""
    heads = []
    for name in ("matrix", "teacher_matrix"):
        head = Head(values[name].shape[1], VOCAB, dtype=dtype)
        head.weight.set_data(Tensor(values[name], dtype))
        head.update_parameters_name(f"{name}.")
        head.weight.requires_grad = name == "matrix"
        heads.append(head)
    loss = DistillationLoss(config, *heads)
    inputs = [Tensor(values[name], dtype) for name in ("states", "teacher_states")]
    weights = ms.ParameterTuple([heads[0].weight, heads[1].weight])
    gradient = ms.value_and_grad(loss, (0, 1), weights, has_aux=True)
    (terms, count), ((by_states, by_teacher), (by_matrix, by_teacher_matrix)) = gradient(
        *inputs, Tensor(values["target"]), Tensor(values["is_code"])
    )
    assert not by_teacher.asnumpy().any()
    assert not by_teacher_matrix.asnumpy().any()
    return terms.asnumpy(), float(count.asnumpy()), by_states.asnumpy(), by_matrix.asnumpy()


@pytest.mark.parametrize("options", OPTIONS)
def test_both_terms_and_their_gradient(options):
    config, values = DistillationConfig(teacher="t", **options), arrays()
    terms, count, *gradients = computed(values, config)
    assert count == (values["target"] >= 0).sum()
    np.testing.assert_allclose(terms / count, expected(values, config), rtol=1e-5)
    rng = np.random.default_rng(1)
    for name, gradient in zip(("states", "matrix"), gradients, strict=True):
        direction, step = rng.normal(size=gradient.shape), 1e-5
        ends = [sum(expected({**values, name: values[name] + sign * step * direction}, config)) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum() / count, slope, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_change_nothing(options, monkeypatch):
    config = DistillationConfig(teacher="t", **options)
    whole = computed(arrays(), config)
    monkeypatch.setattr(distillation, "chunks", lambda rows, _: ((0, 5), (5, 6), (6, rows)))
    for one, other in zip(whole, computed(arrays(), config), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_rows_without_labels_have_a_divergence_unless_masked():
    values = arrays()
    for masked in (False, True):
        config = DistillationConfig(teacher="t", masked=masked)
        gradient = computed(values, config)[2]
        assert gradient[1].any() != masked
        assert gradient[0].any()
        assert not gradient[5].any()


def test_16_bits():
    config, values = DistillationConfig(teacher="t", temperature=2.0), arrays()
    terms, count, *_ = computed(values, config, dtype=ms.float16)
    np.testing.assert_allclose(terms / count, expected(values, config), rtol=3e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gt_weight": 0.0, "kd_weight": 0.0}, "gt_weight is 0.0 and kd_weight 0.0; expected .* one of them above 0"),
        ({"kd_weight": -1.0}, "kd_weight -1.0"),
        ({"temperature": 0.0}, "distillation.temperature is 0.0; expected a number above 0"),
        ({"temperature": float("nan")}, "distillation.temperature is nan"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(UserError, match=message):
        DistillationConfig(teacher="t", **options)
