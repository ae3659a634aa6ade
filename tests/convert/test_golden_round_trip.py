"""Checkpoints of the original programs, converted and led back: the same bytes."""

import pytest

from mindvlm.convert.conversion import ConversionRequest, convert

CASES = ("toy", "toy_e2e", "tiny_opt", "qwen_long", "clip", "sam", "sam_small")


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back_gives_the_same_file(case, ending, golden_dir, tmp_path):
    source = golden_dir(f"vary/{case}") / "weights.safetensors"
    native, back = tmp_path / f"native.{ending}", tmp_path / "back.safetensors"
    convert(ConversionRequest(sources=(source,), target=native, verify="tensors"))
    convert(ConversionRequest(sources=(native,), target=back, to="hf", verify="tensors"))
    assert back.read_bytes() == source.read_bytes()
