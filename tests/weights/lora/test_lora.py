"""Merged adapters equal what torch computes, whatever the dtype, the kind of module and the ranges that are read."""

import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.weights.lora import merged_source
from mindvlm.weights.lora.adapter import open_adapter
from mindvlm.weights.lora.merged_source import MergedSource
from mindvlm.weights.rules.findings import ConversionError
from tests.checkpoint.samples import DTYPES
from tests.weights.lora.adapters import PREFIX, random_weight, read_tensor, source_of, whole_numbers, write_adapter

FLOATS = ["float64", "float32", "float16", "bfloat16"]


def merge(base, folder) -> MergedSource:
    return MergedSource(source_of(base), open_adapter(folder))


@settings(max_examples=60)
@given(
    base_dtype=st.sampled_from(FLOATS),
    adapter_dtype=st.sampled_from(FLOATS),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 6),
    alpha=st.one_of(st.integers(0, 64), st.floats(-40, 40)),
    use_rslora=st.booleans(),
    kind=st.sampled_from(["linear", "transposed", "embedding"]),
    block_bytes=st.integers(1, 200),
    chunk_bytes=st.integers(8, 200),
)
def test_a_merge_is_what_torch_computes(
    tmp_path_factory, base_dtype, adapter_dtype, rows, columns, rank, alpha, use_rslora, kind, block_bytes, chunk_bytes
):
    folder = tmp_path_factory.mktemp("adapter")
    weight = random_weight(rows, columns, dtype=DTYPES[base_dtype])
    into, out = (columns, rows) if kind == "linear" else (rows, columns)
    a = whole_numbers(rank, into, seed=1, dtype=DTYPES[adapter_dtype])
    b = whole_numbers(out, rank, seed=2, dtype=DTYPES[adapter_dtype])
    keys = (
        ("m.lora_embedding_A", "m.lora_embedding_B") if kind == "embedding" else ("m.lora_A.weight", "m.lora_B.weight")
    )
    write_adapter(
        folder,
        dict(zip(keys, (a, b), strict=True)),
        r=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        fan_in_fan_out=kind == "transposed",
    )
    compute = torch.float64 if "float64" in (base_dtype, adapter_dtype) else torch.float32
    scaling = alpha / (rank**0.5 if use_rslora else rank)
    product = b.to(compute) @ a.to(compute)
    expected = weight.to(compute) + (product if kind == "linear" else product.T) * scaling
    other = random_weight(3, 2, seed=5, dtype=DTYPES[base_dtype])
    with mock.patch.object(merged_source, "_BLOCK_BYTES", block_bytes):
        merged = merge({"m.weight": weight, "other.weight": other}, folder)
        assert torch.equal(read_tensor(merged, "m.weight"), expected.to(weight.dtype))
        assert torch.equal(read_tensor(merged, "m.weight", chunk_bytes), expected.to(weight.dtype))
    assert torch.equal(read_tensor(merged, "other.weight"), other)
    assert list(merged.merged) == ["m.weight"] and set(merged.infos) == {"m.weight", "other.weight"}


@settings(max_examples=40)
@given(st.data())
def test_an_element_does_not_depend_on_the_range_it_is_read_in(tmp_path_factory, data):
    """Real factors, where the order of additions shows."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    folder = tmp_path_factory.mktemp("adapter")
    factors = {"m.lora_A.weight": random_weight(2, columns, seed=1), "m.lora_B.weight": random_weight(rows, 2, seed=2)}
    write_adapter(folder, factors)
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    with mock.patch.object(merged_source, "_BLOCK_BYTES", data.draw(st.integers(1, 1000))):
        base = {"m.weight": random_weight(rows, columns)}
        whole = merge(base, folder).read("m.weight").data.reshape(-1)
        assert np.array_equal(merge(base, folder).read_range("m.weight", start, stop), whole[start:stop])


def test_a_merged_linear_layer_answers_as_the_adapted_one(tmp_path):
    weight, a, b = random_weight(6, 10), random_weight(2, 10, seed=1), random_weight(6, 2, seed=2)
    folder = write_adapter(tmp_path, {"m.lora_A.weight": a, "m.lora_B.weight": b})
    x = random_weight(5, 10, seed=3)
    expected = F.linear(x, weight) + 2 * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(F.linear(x, read_tensor(merge({"m.weight": weight}, folder), "m.weight")), expected)


@pytest.mark.parametrize("kernel", [(1,), (3,), (1, 1), (3, 2), (2, 2, 2)])
def test_a_merged_convolution_answers_as_the_adapted_one(tmp_path, kernel):
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    weight, a = random_weight(6, 4, *kernel), random_weight(2, 4, *kernel, seed=1)
    b = random_weight(6, 2, *[1] * len(kernel), seed=2)
    folder = write_adapter(tmp_path, {"m.lora_A.weight": a, "m.lora_B.weight": b}, fan_in_fan_out=True)
    x = random_weight(2, 4, *[5] * len(kernel), seed=3)
    expected = convolve(x, weight) + 2 * convolve(convolve(x, a), b)
    merged = read_tensor(merge({"m.weight": weight}, folder), "m.weight")
    torch.testing.assert_close(convolve(x, merged), expected, atol=1e-4, rtol=1e-5)


def test_a_merged_embedding_answers_as_the_adapted_one(tmp_path):
    weight, a, b = random_weight(20, 6), random_weight(2, 20, seed=1), random_weight(6, 2, seed=2)
    folder = write_adapter(tmp_path, {"m.lora_embedding_A": a, "m.lora_embedding_B": b})
    ids = torch.tensor([[3, 0, 19]])
    expected = F.embedding(ids, weight) + 2 * F.embedding(ids, a.T) @ b.T
    torch.testing.assert_close(F.embedding(ids, read_tensor(merge({"m.weight": weight}, folder), "m.weight")), expected)


def test_ranks_and_alphas_by_pattern(tmp_path):
    """Patterns hold for the end of a name, the first that matches counts, and each table is looked up by itself."""
    modules = {"h.0.q": (3, 5.0), "h.1.q": (4, 7.0), "h.1.k": (2, 8.0), "h.11.q": (4, 4.0)}
    tensors = {}
    for seed, (module, (rank, _)) in enumerate(modules.items()):
        tensors[f"{module}.lora_A.weight"] = whole_numbers(rank, 5, seed=seed)
        tensors[f"{module}.lora_B.weight"] = whole_numbers(6, rank, seed=seed + 9)
    folder = write_adapter(
        tmp_path,
        tensors,
        rank_pattern={"0.q": 3, r"^h\.\d+\.q": 4, "q": 99},
        alpha_pattern={"h.0.q": 5, "^h.1.k": 8, "(1.q|1.k)": 7},
    )
    base = {f"{module}.weight": torch.zeros(6, 5) for module in modules}
    merged = merge(base, folder)
    for seed, (module, (rank, alpha)) in enumerate(modules.items()):
        expected = (whole_numbers(6, rank, seed=seed + 9) @ whole_numbers(rank, 5, seed=seed)) * (alpha / rank)
        assert torch.equal(read_tensor(merged, f"{module}.weight"), expected), module


def test_biases_and_saved_modules_replace_and_shift(tmp_path):
    tensors = {
        "m.base_layer.bias": torch.full((6,), 3.0),
        "m.lora_A.weight": torch.ones(2, 5),
        "m.lora_B.weight": torch.ones(6, 2),
        "m.lora_B.bias": torch.arange(6.0),
        "norm.bias": torch.full((4,), 9.0),
        "head.weight": torch.full((3, 4), 0.1),
        "embed.base_layer.weight": torch.full((7, 4), 2.0),
        "embed.lora_embedding_A": torch.ones(2, 7),
        "embed.lora_embedding_B": torch.ones(4, 2),
    }
    folder = write_adapter(tmp_path, tensors, bias="all", lora_bias=True, modules_to_save=["head"])
    base = {
        "m.weight": torch.zeros(6, 5),
        "m.bias": torch.ones(6),
        "norm.bias": torch.ones(4),
        "head.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "embed.weight": torch.ones(7, 4),
        "left.alone": torch.ones(2),
    }
    merged = merge(base, folder)
    read = {name: read_tensor(merged, name) for name in base}
    assert torch.equal(read["m.weight"], torch.full((6, 5), 4.0))
    assert torch.equal(read["m.bias"], 3 + 2 * torch.arange(6.0))
    assert torch.equal(read["norm.bias"], torch.full((4,), 9.0))
    assert torch.equal(read["head.weight"], torch.full((3, 4), 0.1, dtype=torch.bfloat16))
    assert torch.equal(read["embed.weight"], torch.full((7, 4), 6.0))
    assert torch.equal(read["left.alone"], torch.ones(2))
    used = [key for keys in merged.merged.values() for key in keys]
    assert sorted(used) == sorted(PREFIX + key for key in tensors)


def test_a_sum_beyond_the_dtype_is_refused(tmp_path):
    folder = write_adapter(
        tmp_path, {"m.lora_A.weight": torch.full((2, 3), 300.0), "m.lora_B.weight": torch.full((3, 2), 300.0)}
    )
    merged = merge({"m.weight": torch.ones(3, 3, dtype=torch.float16)}, folder)
    with pytest.raises(UserError, match="m.weight .* beyond the range of float16; convert the base") as caught:
        merged.read("m.weight")
    assert "\n" not in str(caught.value)


def test_infinities_and_nan_of_the_base_stay(tmp_path):
    folder = write_adapter(tmp_path, {"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(3, 2)})
    weight = torch.tensor([[float("inf"), -float("inf"), float("nan")]] * 3, dtype=torch.float16)
    merged = read_tensor(merge({"m.weight": weight}, folder), "m.weight")
    assert torch.equal(merged[:, :2], weight[:, :2]) and merged[:, 2].isnan().all()


def test_memory_is_a_block_and_not_the_tensor(tmp_path):
    rows, columns = 12288, 2048
    factors = {"m.lora_A.weight": torch.ones(2, columns), "m.lora_B.weight": torch.ones(rows, 2)}
    folder = write_adapter(tmp_path, factors)
    base = MemorySource({"m.weight": np.zeros((rows, columns), np.float32)})
    with open_adapter(folder) as adapter:
        tracemalloc.start()
        write_checkpoint(tmp_path / "out.safetensors", MergedSource(base, adapter))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert 2 * peak < 100e6 < rows * columns * 4


def refused(base, folder) -> ConversionError:
    with pytest.raises(ConversionError) as caught:
        merge(base, folder)
    assert "\n" not in str(caught.value)
    return caught.value


def layers(num_layers: int) -> dict[str, torch.Tensor]:
    return {
        f"h.{layer}.q.lora_{part}.weight": torch.ones((2, 5) if part == "A" else (6, 2))
        for layer in range(num_layers)
        for part in "AB"
    }


def test_files_beside_an_adapter_are_no_base(tmp_path):
    folder = write_adapter(tmp_path, {**layers(1), "norm.bias": torch.ones(2)})
    error = refused({"norm.bias": torch.ones(2)}, folder)
    assert "does not fit" in str(error) and str(error).endswith("; give the weights on which it was trained")


def test_targets_that_the_base_has_not(tmp_path):
    folder = write_adapter(tmp_path, {**layers(3), "norm.bias": torch.ones(2)})
    error = refused({"h.0.q.weight": torch.ones(6, 5), "x.norm.bias": torch.ones(2)}, folder)
    assert {finding.status for finding in error.findings} == {"unexpected"}
    assert {finding.name for finding in error.findings} == {
        *(f"{PREFIX}h.{layer}.q.lora_{part}.weight" for layer in (1, 2) for part in "AB"),
        f"{PREFIX}norm.bias",
    }
    with open_adapter(folder) as adapter:
        infos = source_of({f"h.{n}.q.weight": torch.ones(1) for n in range(3)} | {"norm.bias": torch.ones(1)}).infos
        assert adapter.fits(infos) and not adapter.fits(source_of({"h.0.q.weight": torch.ones(1)}).infos)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 4), r"changes a tensor of shape \[6, 5\], the base has \[6, 4\]"),
        ((5, 6), "is fan_in_fan_out in adapter_config.json right"),
        ((6, 5, 1), "changes a weight of another kind"),
        ((30,), "changes a weight of another kind"),
        ((), "changes a weight of another kind"),
    ],
)
def test_shapes_that_conflict(tmp_path, shape, message):
    error = refused({"h.0.q.weight": torch.ones(shape)}, write_adapter(tmp_path, layers(1)))
    assert [(finding.status, finding.name) for finding in error.findings] == [("shape", f"{PREFIX}h.0.q.lora_A.weight")]
    with pytest.raises(ConversionError, match=message):
        merge({"h.0.q.weight": torch.ones(shape)}, tmp_path)


def test_a_convolution_in_groups_is_refused(tmp_path):
    tensors = {"m.lora_A.weight": torch.ones(2, 4, 3, 3), "m.lora_B.weight": torch.ones(6, 1, 1, 1)}
    with pytest.raises(ConversionError, match=r"\[2, 4, 3, 3\] does not multiply with B of \[6, 1, 1, 1\]"):
        open_adapter(write_adapter(tmp_path, tensors))


def test_replacements_of_another_shape(tmp_path):
    folder = write_adapter(tmp_path, {"head.weight": torch.ones(4, 4)}, modules_to_save=["head"])
    error = refused({"head.weight": torch.ones(3, 4)}, folder)
    assert [(finding.status, finding.name) for finding in error.findings] == [("shape", f"{PREFIX}head.weight")]


def test_integer_weights_cannot_be_merged(tmp_path):
    error = refused({"h.0.q.weight": torch.ones(6, 5, dtype=torch.int8)}, write_adapter(tmp_path, layers(1)))
    assert [finding.status for finding in error.findings] == ["dtype"]


def test_a_layer_that_the_adapter_leaves_out_is_named(tmp_path):
    base = {f"{tower}.{layer}.q.weight": torch.ones(6, 5) for tower in ("h", "other") for layer in range(4)}
    tensors = {key: tensor for key, tensor in layers(4).items() if not key.startswith("h.2.")}
    error = refused(base, write_adapter(tmp_path / "a", tensors, target_modules=["k", "q"]))
    assert [(finding.status, finding.name) for finding in error.findings] == [("missing", "h.2.q.weight")]
    for chosen in ({"layers_to_transform": [0, 1, 3]}, {"exclude_modules": ["h.2.q"]}):
        merge(base, write_adapter(tmp_path / "b", tensors, target_modules=["q"], **chosen))
    for targets in (".*q", ["h.0.q", "h.1.q", "h.3.q"], None):
        merge(base, write_adapter(tmp_path / "c", tensors, target_modules=targets))


def test_a_merged_base_is_noticed(tmp_path):
    """Under rounding to 16 bits too; a base that it was not merged into has a share near zero."""
    modules = [f"h.{layer}.q" for layer in range(8)]
    factors = {}
    for seed, module in enumerate(modules):
        factors[f"{module}.lora_A.weight"] = 0.2 * random_weight(2, 48, seed=seed)
        factors[f"{module}.lora_B.weight"] = 0.2 * random_weight(32, 2, seed=seed + 9)
    for dtype in (torch.float32, torch.bfloat16):
        base = {
            f"{module}.weight": random_weight(32, 48, seed=seed + 20, dtype=dtype)
            for seed, module in enumerate(modules)
        }
        for alpha in (4, -4):
            merged = merge(base, write_adapter(tmp_path / "a", factors, lora_alpha=alpha))
            assert not merged.holds_adapter()
            once = {name: read_tensor(merged, name) for name in base}
            assert merge(once, tmp_path / "a").holds_adapter()
            # another adapter of the same shapes
            assert not merge(
                once, write_adapter(tmp_path / "b", {k: v.flip(-1) for k, v in factors.items()})
            ).holds_adapter()


def test_nan_in_an_adapter_is_an_error_that_names_it(tmp_path):
    b = torch.zeros(3, 2)
    b[2, 1] = torch.nan
    write_adapter(tmp_path, {"m.lora_A.weight": torch.ones(2, 4), "m.lora_B.weight": b})
    merged = merge({"m.weight": torch.ones(3, 4)}, tmp_path)
    with pytest.raises(UserError, match="adapter_model.safetensors: tensor base_model.model.m.lora_B.weight holds NaN"):
        merged.read("m.weight")
