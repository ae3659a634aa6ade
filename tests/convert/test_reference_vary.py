"""The torch reference of Vary-toy against transformers, against definitions written out, and against itself."""

import numpy as np
import pytest
import torch
import transformers

from mindvlm.convert.random_weights import random_tensor
from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.rotary import inverse_frequencies, logn_multipliers, ntk_alpha
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary import ReferenceVary
from mindvlm.models.hf.towers import read_tower
from mindvlm.models.vary.hf_config import ImageTokens, from_hf_config, vary_toy_config
from mindvlm.models.vary.model_config import VisionVocabularyConfig
from mindvlm.weights.config_json import ConfigTable
from tests.hf_shapes import toy_shapes

FORWARD_BOUND = 1e-5


def small_config(**changes) -> dict:
    config = vary_toy_config() | {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 16,
        "vocab_size": 64,
        "seq_length": 512,
        "image_token_len": 16,
        "im_patch_token": 63,
        "im_start_token": 61,
        "im_end_token": 62,
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        "vision_high_config": {
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "global_attn_indexes": [1],
            "image_size": 256,
            "out_chans": 8,
            "net_2_channels": 12,
            "net_3_channels": 20,
        },
    }
    return config | changes


def prompt(*parts: list[int], span: int = 16) -> torch.Tensor:
    """Token ids (1, L): the parts, with an image span between each two."""
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [61, *[63] * span, 62, *part]
    return torch.tensor([ids])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def images(num: int, seed: int = 0, high: tuple[int, int] = (256, 256)) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(num, 3, 56, 56, seed=seed), noise(num, 3, *high, seed=seed + 1)


@pytest.mark.parametrize(
    ("length", "alpha", "base"),
    [(1, 1, 10000.0), (8192, 1, 10000.0), (8193, 3, 30527.74), (16384, 3, 30527.74), (16385, 7, 72195.86)],
)
def test_dynamic_ntk_of_the_released_sizes(length, alpha, base):
    assert ntk_alpha(length, 8192) == alpha
    assert float(inverse_frequencies(128, 10000.0, alpha)[1] ** -64) == pytest.approx(base, rel=1e-5)


def test_logn_of_the_released_sizes():
    table = logn_multipliers(16384, 8192)
    assert bool((table[:8192] == 1).all())
    assert float(table[8192]) == pytest.approx(1.0000135, abs=1e-7)
    assert float(table[16383]) == pytest.approx(1.0769231, abs=1e-7)


def test_layout_is_the_state_dict_and_counts_the_released_tensors():
    small = small_config()
    oblong = {
        "image_token_len": 10,
        "vision_config": {**small["vision_config"], "image_size": [28, 70]},
        "vision_high_config": {"image_size": [128, 320]},
    }
    for config in (vary_toy_config(), small, small | oblong):
        with torch.device("meta"):
            state = ReferenceVary(from_hf_config(config)).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == toy_shapes(config)
    shapes = toy_shapes(vary_toy_config())
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())) == (769, 2_237_365_504)


def test_random_weights_depend_on_name_and_seed_only():
    state = ReferenceVary.from_seed(from_hf_config(small_config()), 3, device="cpu").state_dict()
    for name, value in state.items():
        np.testing.assert_array_equal(random_tensor(name, value.shape, 3), value)
    name = "transformer.h.1.mlp.w1.weight"
    assert not np.array_equal(random_tensor(name, (48, 32), 4), state[name])
    assert not torch.equal(state["transformer.h.0.mlp.w1.weight"], state[name])
    assert float(state["transformer.ln_f.weight"].mean()) == pytest.approx(1, abs=0.1)


def test_state_dict_is_strict_and_drops_computed_buffers():
    config = from_hf_config(small_config())
    state = dict(ReferenceVary.from_seed(config, 0, device="cpu").state_dict())
    ReferenceVary.from_state(config, state | {"transformer.rotary_emb.inv_freq": torch.zeros(8)}, device="cpu")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ReferenceVary.from_state(config, state | {"transformer.wpe.weight": torch.zeros(8)}, device="cpu")
    state.pop("lm_head.weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        ReferenceVary.from_state(config, state, device="cpu")


@torch.no_grad()
def test_clip_equals_transformers():
    config = {**vary_toy_config()["vision_config"], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "image_size": 70}
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)).eval()
    prefixed = "vision_model." if not next(iter(theirs.state_dict())).startswith("vision_model.") else ""
    state = {
        prefixed + name: noise(*value.shape, seed=i) / 4 for i, (name, value) in enumerate(theirs.named_parameters())
    }
    theirs.load_state_dict({name.removeprefix(prefixed): value for name, value in state.items()}, strict=False)
    ours = ClipTower(read_tower(ConfigTable(config))).eval()
    ours.load_state_dict(state)
    pixels = noise(2, 3, 70, 70)
    expected = theirs(pixels, output_hidden_states=True)
    states = ours.hidden_states(pixels)
    for actual, wanted in zip(states, expected.hidden_states, strict=True):
        assert relative(actual, wanted) < FORWARD_BOUND
    assert relative(ours.features(pixels), expected.hidden_states[-2][:, 1:]) < FORWARD_BOUND
    assert relative(ours.pooled(states[-1]), expected.pooler_output) < FORWARD_BOUND


@torch.no_grad()
@pytest.mark.parametrize("size", [(256, 256), (320, 224)])
def test_vocabulary_attention_equals_its_definition(size):
    """Relative positions and windows written out per pair of pixels."""
    config = {**vary_toy_config()["vision_high_config"], "embed_dim": 16, "num_heads": 2, "image_size": list(size)}
    config |= {"depth": 1, "global_attn_indexes": [0]}
    attention = VisionVocabulary(VisionVocabularyConfig(**config)).eval().blocks[0].attn
    for index, (name, parameter) in enumerate(attention.named_parameters()):
        parameter.copy_(torch.from_numpy(random_tensor(name, parameter.shape, index)))
    rows, columns = size[0] // 16, size[1] // 16
    x = noise(1, rows, columns, 16)
    q, k, v = attention.qkv(x).reshape(-1, 3, 2, 8).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / 8**0.5
    for i in range(rows * columns):
        y, z = divmod(i, columns)
        for j in range(rows * columns):
            table = (
                attention.rel_pos_h[y - j // columns + rows - 1] + attention.rel_pos_w[z - j % columns + columns - 1]
            )
            scores[:, i, j] += q[:, i] @ table
    expected = attention.proj((scores.softmax(-1) @ v).permute(1, 0, 2).reshape(1, rows, columns, 16))
    assert relative(attention(x), expected) < FORWARD_BOUND


@pytest.fixture(scope="module")
def model() -> ReferenceVary:
    made = ReferenceVary.from_seed(from_hf_config(small_config()), 7, device="cpu")
    made.image_tokens = ImageTokens.of(small_config())
    return made


LEFT, RIGHT = prompt([3, 4, 5], [6, 7]), prompt([8], [9, 10, 11, 12])


@torch.no_grad()
def test_cached_decoding_equals_one_pass(model):
    input_ids, pair = prompt([1, 2], [5], [6, 7, 8]), images(2)
    generated = model.generate(input_ids, [pair], max_new_tokens=12)
    prompt_embeds = model.merge(input_ids, [model.encode_images(*pair)])
    embeds = torch.cat([prompt_embeds, model.merge(generated.ids[:, :-1])], dim=1)
    hidden, _ = model.transformer.decode(embeds)
    expected = model.logits(hidden[:, input_ids.shape[1] - 1 :])
    assert relative(torch.stack(generated.logits, dim=1), expected) < FORWARD_BOUND
    assert torch.equal(expected.argmax(-1), generated.ids)


@torch.no_grad()
def test_prefill_in_pieces_equals_one_piece(model):
    embeds = model.merge(prompt([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    whole, pieces = model.new_cache(1, 9), model.new_cache(1, 9)
    expected = model.prefill(embeds, whole)
    model.prefill(embeds[:, :4], pieces)
    actual = model.prefill(embeds[:, 4:], pieces)
    assert relative(actual, expected) < FORWARD_BOUND
    assert relative(pieces.keys[1], whole.keys[1]) < FORWARD_BOUND
    with pytest.raises(ValueError, match="10 positions: the cache has 9"):
        model.decode_step(torch.tensor([1]), pieces)


@torch.no_grad()
def test_batch_equals_single_rows(model):
    pairs = [images(1, 0), images(1, 5), None]
    rows = [LEFT, torch.cat([RIGHT, prompt([13, 14])], dim=1), prompt([20, 21, 22, 23])]
    length = max(row.shape[1] for row in rows)
    masks = [torch.ones_like(row) for row in rows]
    right = [torch.nn.functional.pad(row, (0, length - row.shape[1])) for row in rows]
    right_mask = [torch.nn.functional.pad(mask, (0, length - mask.shape[1])) for mask in masks]
    batch = model(torch.cat(right), pairs, attention_mask=torch.cat(right_mask))
    left = [torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows]
    left_mask = torch.cat([torch.nn.functional.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
    generated = model.generate(torch.cat(left), pairs, attention_mask=left_mask, max_new_tokens=5)
    for index, row in enumerate(rows):
        single = model(row, [pairs[index]])
        assert relative(batch.logits[index, : row.shape[1]], single.logits[0]) < FORWARD_BOUND
        alone = model.generate(row, [pairs[index]], max_new_tokens=5)
        assert torch.equal(alone.ids[0], generated.ids[index])
        actual = torch.stack(generated.logits)[:, index]
        # The slots differ by the padding, so the rotary angles are rounded differently.
        assert relative(actual, torch.stack(alone.logits)[:, 0]) < 1e-4


@torch.no_grad()
def test_a_text_row_ignores_its_image_entry(model):
    row = prompt([20, 21, 22, 23])
    assert torch.equal(model(row, [images(1)]).logits, model(row).logits)


def test_gradients_reach_projectors_and_decoder_but_no_tower(model):
    loss = model(LEFT, [images(1)], labels=torch.where(LEFT < 10, LEFT, -100)).loss
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    without = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    assert without == {name for name in names if "vision_tower" in name}


@torch.no_grad()
def test_loss_is_the_mean_over_kept_next_tokens(model):
    labels = LEFT.clone()
    labels[:, :-2] = -100
    output = model(LEFT, [images(1)], labels=labels)
    chosen = output.logits[0, -3:-1].log_softmax(-1).gather(1, LEFT[0, -2:, None])
    assert float(output.loss) == pytest.approx(-float(chosen.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("input_ids", "entries", "message"),
    [
        (LEFT, [images(2)], "1 <img> and 1 </img> tokens for 2 images"),
        (LEFT, [None], "1 <img> and 1 </img> tokens for 0 images"),
        (LEFT, [images(1), images(1)], "2 image entries for 1 samples"),
        (prompt([1], [2], span=15), [images(1)], "</img> is not 17 tokens after it"),
        (LEFT[:, :-3], [images(1)], "1 <img> and 0 </img>"),
    ],
)
def test_a_wrong_splice_is_refused(model, input_ids, entries, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids, entries)


def test_right_padding_is_refused_for_generation(model):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate(prompt([1, 2]), attention_mask=torch.tensor([[1, 0]]), max_new_tokens=1)
