"""The torch reference of Vary-tiny against transformers' OPT and the recorded arrays of the original program."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mindvlm.convert.random_weights import fill_random
from mindvlm.convert.reference.vary import parameter_groups
from mindvlm.convert.reference.vary_tiny import ReferenceVaryTiny
from mindvlm.models.vary.hf_config import ImageTokens, from_hf_config
from tests.golden_files import golden_path
from tests.hf_shapes import tiny_shapes

CONFIG = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "ffn_dim": 40,
    "vocab_size": 50,
    "max_position_embeddings": 30,
    "im_patch_token": 47,
    "im_start_token": 48,
    "im_end_token": 49,
    "vision_high_config": {
        "embed_dim": 12, "depth": 2, "num_heads": 2, "global_attn_indexes": [1], "window_size": 3,
        "image_size": [32, 64], "patch_size": 4, "out_chans": 6, "net_2_channels": 8, "net_3_channels": 10,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> ReferenceVaryTiny:
    return ReferenceVaryTiny.from_seed(from_hf_config(CONFIG), 0, device="cpu")


@pytest.fixture(scope="module")
def peer(model) -> transformers.OPTForCausalLM:
    sizes = {key: value for key, value in CONFIG.items() if not key.startswith(("im_", "vision"))}
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, word_embed_proj_dim=24, pad_token_id=1, attn_implementation="eager")
    )
    opt.model.decoder.load_state_dict(model.model.decoder.state_dict())
    return opt.eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(4, 47, shape))


def test_the_decoder_is_that_of_transformers(model, peer):
    tokens = ids(3, 11)
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, peer(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens(model, peer, side):
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    padded = slice(0, 4) if side == "left" else slice(5, 9)
    tokens[1, padded], mask[1, padded] = 1, 0
    with torch.no_grad():
        ours, theirs = model(tokens, attention_mask=mask).logits, peer(tokens, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)
    assert model.model.decoder.position_rows(mask.bool())[1, padded].eq(1).all()


def test_a_left_padded_row_generates_what_it_generates_alone(model):
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    tokens[1, :4], mask[1, :4] = 1, 0
    both = model.generate(tokens, attention_mask=mask, max_new_tokens=6)
    alone = model.generate(tokens[1:, 4:], max_new_tokens=6)
    assert torch.equal(both.ids[1], alone.ids[0])
    for step, single in zip(both.logits, alone.logits, strict=True):
        assert torch.allclose(step[1], single[0], atol=1e-5)


def test_more_tokens_than_positions(model):
    with pytest.raises(ValueError, match="31 tokens: there are 30 positions"):
        model(ids(1, 31))


def test_both_spellings_and_an_untied_head(model):
    state = model.state_dict()
    other = {name.replace("vision_tower_2", "vision_tower"): value for name, value in state.items()}
    other["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    again = ReferenceVaryTiny.from_state(from_hf_config(CONFIG), other, device="cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    other["lm_head.weight"] = other["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        ReferenceVaryTiny.from_state(from_hf_config(CONFIG), other, device="cpu")


def test_parameters_are_those_of_the_layout(model):
    config = {**CONFIG, "word_embed_proj_dim": 24, "image_token_len": 8}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {name: shape for name, shape in tiny_shapes(config).items() if name != "lm_head.weight"}
    assert shapes == expected
    filled = fill_random(np.empty((24,), np.float32), "model.mm_projector.bias", seed=0)
    np.testing.assert_array_equal(model.state_dict()["model.mm_projector.bias"], filled)


def test_every_recorded_array():
    folder = golden_path("vary/tiny_opt")
    config = json.loads((folder / "config.json").read_text())
    state = {key: value.float() for key, value in load_file(folder / "weights.safetensors").items()}
    data = {key: torch.from_numpy(value) for key, value in np.load(folder / "inputs.npz").items()}
    expected = dict(np.load(folder / "outputs.npz"))

    def check(name: str, actual: torch.Tensor, bound: float = 1e-5) -> None:
        recorded, actual = expected.pop(name), np.asarray(actual.detach())
        if recorded.dtype.kind == "i":
            np.testing.assert_array_equal(actual, recorded, err_msg=name)
            return
        error = np.linalg.norm((actual - recorded).ravel()) / np.linalg.norm(recorded.ravel())
        print(f"{name}: {error:.2e}")
        assert actual.shape == recorded.shape and error <= bound, f"{name}: {error:.2e}"

    model = ReferenceVaryTiny.from_state(from_hf_config(config), state, device="cpu")
    model.image_tokens = ImageTokens.of(config)
    high = data["pixel_values_high"]
    images = [high[:1], high[1:2], torch.zeros_like(high[:1])]
    mask = data["batch_attention_mask"]
    with torch.no_grad():
        feature = model.vocabulary_features(high[:1])
        check("single_sam_feature", feature)
        check("single_projected", model.model.mm_projector(feature))
        single = model(data["single_input_ids"], images[:1])
        check("single_merged_embeds", single.merged_embeds)
        for layer, state in enumerate(single.block_inputs):
            check(f"single_hidden_{layer}", state)
        check("single_last_hidden", single.last_hidden)
        check("single_logits", single.logits)
    alone = model.generate(data["single_input_ids"], images[:1], max_new_tokens=16)
    check("single_gen_ids", alone.ids)
    check("single_gen_logits", torch.stack(alone.logits))
    rows = model.generate(data["gen_input_ids"], images, max_new_tokens=16, attention_mask=data["gen_attention_mask"])
    check("gen_ids", rows.ids)
    check("gen_logits", torch.stack(rows.logits))
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=2e-3, betas=(0.9, 0.999), eps=1e-5)
    output = model.train()(data["batch_input_ids"], images, attention_mask=mask, labels=data["batch_labels"])
    check("batch_logits", output.logits * mask[..., None])
    check("loss", output.loss)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    for key in [key for key in expected if key.startswith("grad:")]:
        check(key, parameters[key.removeprefix("grad:")].grad, 1e-4)
    optimizer.step()
    for key in [key for key in expected if key.startswith("after:")]:
        check(key, parameters[key.removeprefix("after:")], 1e-4)
    assert not expected, f"arrays without a comparison: {sorted(expected)}"
