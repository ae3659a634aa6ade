"""The fused attention against the eager one, with the operator's documented meaning in place of the operator."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext
from mindvlm.models.vary.model_config import VisionVocabularyConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabulary
from mindvlm.nn import fused_attention
from mindvlm.nn.config import DecoderConfig, VitConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.fused_attention import FusedAttention, can_fuse, later_keys
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.vit import SiglipTransformer, VisionTransformer

HEAD_DIM = 16


def documented_operator(query, key, value, head_num, attn_mask=None, scalar_value=1.0, input_layout="BSH"):
    """`ops.flash_attention_score` as its documentation describes it: True in the mask drops a score."""
    assert input_layout == "BNSD"
    assert head_num == query.shape[1]
    groups = query.shape[1] // key.shape[1]
    key, value = (ops.repeat_interleave(x, groups, 1) if groups > 1 else x for x in (key, value))
    scores = ops.matmul(query.astype(ms.float32), key.astype(ms.float32).swapaxes(-1, -2)) * scalar_value
    if attn_mask is not None:
        scores = ops.masked_fill(scores, attn_mask, -1e30)
    return ops.matmul(ops.softmax(scores, -1), value.astype(ms.float32)).astype(query.dtype)


def randomised(cell: nn.Cell) -> nn.Cell:
    """Random float16 weights by order, the same for two Cells of the same parameters."""
    generator = np.random.default_rng(0)
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor((generator.standard_normal(parameter.shape) * 0.3).astype(np.float16)))
    return cell.set_train(False)


def both(build, monkeypatch):
    """The Cell with eager attention and the same with fused attention."""
    eager, fused = (
        randomised(build(BuildContext(dtype=ms.float16, attention=choice))) for choice in ("eager", "fused")
    )
    calls = []

    def operator(*args, **kwargs):
        calls.append(args[0].shape)
        return documented_operator(*args, **kwargs)

    monkeypatch.setattr(fused_attention.ops, "flash_attention_score", operator)
    return eager, fused, calls


def assert_close(result, expected):
    result, expected = result.asnumpy().astype(np.float32), expected.asnumpy().astype(np.float32)
    assert np.linalg.norm(result - expected) < 5e-3 * np.linalg.norm(expected)


def noise(*shape, dtype=np.float16) -> Tensor:
    return Tensor(np.random.default_rng(1).standard_normal(shape).astype(dtype))


def decoder(context: BuildContext) -> CausalLM:
    config = DecoderConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        intermediate_size=24,
    )
    return CausalLM(config, context)


def test_a_decoder_without_and_with_cache(monkeypatch, pynative):
    eager, fused, calls = both(decoder, monkeypatch)
    embeds = noise(2, 7, 32)
    inv_freq = Tensor(inverse_frequencies(HEAD_DIM, 10000.0))
    whole = eager(embeds, inv_freq)

    assert_close(fused(embeds, inv_freq), whole)
    caches = fused.new_caches(2, 12)
    positions = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    prefilled = fused.with_cache(embeds[:, :6], Tensor(positions[:, :6]), inv_freq, caches)
    decoded = fused.with_cache(embeds[:, 6:], Tensor(positions[:, 6:]), inv_freq, caches)

    assert_close(prefilled, whole[:, :6])
    assert_close(decoded, whole[:, 6:])
    assert len(calls) == 3 * 2


@pytest.mark.parametrize("num_key_value_heads", [2, 1])
def test_segments_of_a_row_do_not_see_each_other(monkeypatch, pynative, num_key_value_heads):
    config = decoder(BuildContext()).config
    config = dataclasses.replace(config, num_key_value_heads=num_key_value_heads)
    eager, fused, calls = both(lambda context: CausalLM(config, context), monkeypatch)
    embeds, inv_freq = noise(2, 9, 32), Tensor(inverse_frequencies(HEAD_DIM, 10000.0))
    lengths = [[4, 5], [2, 7]]
    positions = Tensor(np.array([[*range(first), *range(second)] for first, second in lengths], np.int32))
    segments = Tensor(np.array([[0] * first + [1] * second for first, second in lengths], np.int32))
    expected = np.stack(
        [
            np.concatenate([eager(part, inv_freq).asnumpy()[0] for part in (row[None, :first], row[None, first:])])
            for row, (first, _) in zip(embeds, lengths, strict=True)
        ]
    )
    assert_close(eager(embeds, inv_freq, positions, segments), Tensor(expected))
    assert not calls
    assert_close(fused(embeds, inv_freq, positions, segments), Tensor(expected))
    assert len(calls) == 2


def test_grouped_heads(monkeypatch, pynative):
    config = DecoderConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=HEAD_DIM, intermediate_size=24, qkv_bias=False, use_dynamic_ntk=False, use_logn_attn=False,
    )  # fmt: skip
    eager, fused, calls = both(lambda context: CausalLM(config, context), monkeypatch)
    embeds, inv_freq = noise(2, 9, 32), Tensor(inverse_frequencies(HEAD_DIM, 10000.0))

    assert_close(fused(embeds, inv_freq), eager(embeds, inv_freq))
    positions = Tensor(np.tile(np.arange(9, dtype=np.int32), (2, 1)))
    cached = fused.with_cache(embeds, positions, inv_freq, fused.new_caches(2, 12))
    assert_close(cached, eager(embeds, inv_freq))
    assert calls == [(2, 4, 9, HEAD_DIM)] * 4


def test_siglip_whose_heads_are_padded(monkeypatch, pynative):
    config = VitConfig(
        dialect="siglip",
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
    )
    build = lambda context: SiglipTransformer(config, context, select_layer=-1, num_dropped_tokens=0)  # noqa: E731
    eager, fused, calls = both(build, monkeypatch)
    pixels = noise(2, 3, 28, 28)

    assert_close(fused(pixels), eager(pixels))
    assert calls == [(2, 2, 4, 16)]


def test_clip(monkeypatch, pynative):
    config = VitConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    eager, fused, calls = both(lambda context: VisionTransformer(config, context), monkeypatch)
    pixels = noise(2, 3, 28, 28)

    assert_close(fused(pixels), eager(pixels))
    assert calls == [(2, 2, 5, 16)]


def test_a_vision_vocabulary_whose_heads_are_padded(monkeypatch, pynative):
    config = VisionVocabularyConfig(
        embed_dim=16,
        depth=2,
        num_heads=2,
        global_attn_indexes=[1],
        window_size=3,
        image_size=[20, 16],
        patch_size=4,
        out_chans=4,
        net_2_channels=4,
        net_3_channels=4,
    )
    eager, fused, calls = both(lambda context: VisionVocabulary(config, context), monkeypatch)
    pixels = noise(2, 3, 20, 16)

    assert_close(fused(pixels), eager(pixels))
    # 8 dimensions and 3 + 3 positions in a window, 8 and 5 + 4 in the whole grid
    assert calls == [(8, 2, 9, 16), (2, 2, 20, 32)]


def test_later_keys_are_dropped():
    mask = later_keys(Tensor([[0, 2]], ms.int32), Tensor([0, 1, 2, 3], ms.int32))

    assert mask.asnumpy().tolist() == [[[[False, True, True, True], [False, False, False, True]]]]


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        ([(1, 2, 4, 16), (1, 2, 6, 16), (1, 2, 5, 16), (1, 1, 4, 6)], "bbb?", "differ in batch, heads"),
        ([(1, 2, 4, 24), (1, 2, 6, 24), (1, 2, 6, 24), (1, 1, 4, 6)], "bbb?", "multiple of 16"),
        ([(1, 2, 4, 16), (1, 2, 6, 16), (1, 2, 6, 16), (1, 1, 4, 5)], "bbb?", "the mask must be bool"),
        ([(1, 2, 4, 16), (1, 2, 6, 16), (1, 2, 6, 16), (1, 1, 4, 6)], "bbbf", "the mask must be bool"),
        ([(1, 2, 4, 16), (1, 2, 6, 16), (1, 2, 6, 16), (1, 1, 4, 6)], "bbh?", "all float16 or all bfloat16"),
        ([(1, 2, 4, 16), (1, 2, 6, 16), (1, 2, 6, 16), (1, 1, 4, 6)], "fff?", "all float16 or all bfloat16"),
    ],
)
def test_what_the_operator_would_refuse_on_the_npu_is_refused_by_the_compiler(shapes, dtypes, message):
    kinds = {"b": ms.bfloat16, "h": ms.float16, "f": ms.float32, "?": ms.bool_}
    inputs = [Tensor(shape=shape, dtype=kinds[kind]) for shape, kind in zip(shapes, dtypes, strict=True)]

    with pytest.raises(ValueError, match=message):
        FusedAttention().compile(*inputs)


@pytest.mark.parametrize(
    ("choice", "dtype", "head_dim", "expected"),
    [
        ("eager", ms.bfloat16, 64, False),
        ("auto", ms.bfloat16, 64, True),
        ("auto", ms.float16, 128, True),
        ("auto", ms.float32, 64, False),
        ("auto", ms.float16, 40, False),
        ("auto", ms.float16, 528, False),
        ("fused", ms.float16, 64, True),
    ],
)
def test_what_can_be_fused(choice, dtype, head_dim, expected):
    assert can_fuse(BuildContext(dtype=dtype, attention=choice), head_dim) == expected


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (ms.float32, 64, "attention is 'fused' but the dtype is float32 and the operator accepts float16 and bfloat16"),
        (ms.float16, 40, "a head of this model has 40 dimensions.*; set attention: auto or eager"),
    ],
)
def test_fused_attention_that_cannot_be(dtype, head_dim, message):
    with pytest.raises(UserError, match=message):
        can_fuse(BuildContext(dtype=dtype, attention="fused"), head_dim)
