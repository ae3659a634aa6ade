"""The torch reference of Vary-toy against every recorded array of the original program."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.rotary import inverse_frequencies, logn_multipliers, ntk_alpha
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary import ReferenceVary, parameter_groups
from mindvlm.models.vary.hf_config import ImageTokens, from_hf_config
from tests.golden_files import golden_path

FORWARD_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Case:
    """One golden folder: config, float32 weights, inputs, and `check`, which marks the expected arrays as compared."""

    def __init__(self, name: str) -> None:
        folder = golden_path(f"vary/{name}")
        self.config = json.loads((folder / "config.json").read_text())
        self.state = {key: value.float() for key, value in load_file(folder / "weights.safetensors").items()}
        self.folder = folder
        self.inputs = {key: torch.from_numpy(value) for key, value in np.load(folder / "inputs.npz").items()}
        self.expected = dict(np.load(folder / "outputs.npz"))

    def model(self) -> ReferenceVary:
        made = ReferenceVary.from_state(from_hf_config(self.config), self.state, device="cpu")
        made.image_tokens = ImageTokens.of(self.config)
        return made

    def tower(self, tower: torch.nn.Module, prefix: str) -> torch.nn.Module:
        tower.load_state_dict({name.removeprefix(prefix): value for name, value in self.state.items()})
        return tower.eval()

    def check(self, name: str, actual: torch.Tensor, bound: float = FORWARD_BOUND) -> None:
        expected, actual = self.expected.pop(name), np.asarray(actual.detach())
        assert actual.shape == expected.shape, name
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(actual, expected, err_msg=name)
            return
        error = np.linalg.norm((actual - expected).ravel()) / np.linalg.norm(expected.ravel())
        print(f"{name}: {error:.2e}")
        assert error <= bound, f"{name}: {error:.2e}"

    def check_top8(self, name: str, logits: torch.Tensor) -> None:
        """Compare the 8 largest values of each row, and their ids wherever neighbours are further apart than noise."""
        values, ids = logits.topk(8, dim=-1)
        clear = values.diff(dim=-1).abs().amin(-1) > 1e-4
        expected_ids = torch.from_numpy(self.expected.pop(f"{name}_ids"))
        assert clear.float().mean() > 0.5
        assert torch.equal(ids[clear], expected_ids[clear].long())
        self.check(f"{name}_values", values)

    def check_training(self, model: ReferenceVary, **batch: torch.Tensor) -> torch.Tensor:
        """Loss, gradients and one AdamW step; returns the training logits."""
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=2e-3, betas=(0.9, 0.999), eps=1e-5)
        output = model.train()(**batch)
        output.loss.backward()
        self.check("loss", output.loss)
        parameters = dict(model.named_parameters())
        for key in [key for key in self.expected if key.startswith("grad:")]:
            self.check(key, parameters[key.removeprefix("grad:")].grad, GRADIENT_BOUND)
        towers = {name: p.detach().clone() for name, p in parameters.items() if "vision_tower" in name}
        optimizer.step()
        for key in [key for key in self.expected if key.startswith("after:")]:
            self.check(key, parameters[key.removeprefix("after:")], GRADIENT_BOUND)
        assert all(torch.equal(parameters[name], value) for name, value in towers.items())
        return output.logits

    def check_complete(self) -> None:
        assert not self.expected, f"arrays without a comparison: {sorted(self.expected)}"


def toy_batch(data: dict[str, torch.Tensor]) -> dict:
    """Two image rows and a text row whose image entry is all zeros, as the official dataset supplies it."""
    pairs = [(data["pixel_values_clip"][i : i + 1], data["pixel_values_high"][i : i + 1]) for i in range(2)]
    return {
        "input_ids": data["batch_input_ids"],
        "images": [*pairs, tuple(torch.zeros_like(pixels) for pixels in pairs[0])],
        "attention_mask": data["batch_attention_mask"],
        "labels": data["batch_labels"],
    }


@torch.no_grad()
def test_clip_golden():
    case = Case("clip")
    tower = case.tower(ClipTower(from_hf_config(case.config).vision_tower), "transformer.vision_tower.")
    pixels = case.inputs["pixel_values_clip"]
    states = tower.hidden_states(pixels)
    for index, state in enumerate(states):
        case.check(f"hidden_{index}", state[:1])
    case.check("feature", tower.features(pixels, select_layer=case.config["vision_select_layer"]))
    case.check("last_hidden_state", states[-1])
    case.check("pooler_output", tower.pooled(states[-1]))
    case.check_complete()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sam", "sam_small"])
def test_vocabulary_golden(name):
    case = Case(name)
    tower = case.tower(
        VisionVocabulary(from_hf_config(case.config).vision_vocabulary), "transformer.vision_tower_high."
    )
    pixels = case.inputs["pixel_values_high"]
    stages = tower.stages(pixels)
    assert torch.equal(stages["tokens"], tower(pixels))
    stages["neck"] = stages["neck"][:, :, ::2, ::2]
    for stage in [stage for stage in stages if stage == "embed" or stage.startswith("block")]:
        stages[stage] = stages[stage][:, ::2, ::2]
    for stage in list(case.expected):
        case.check(stage, stages[stage])


@torch.no_grad()
def test_toy_golden_forward():
    case = Case("toy")
    model, data = case.model(), case.inputs
    pairs = [(data["pixel_values_clip"][i : i + 1], data["pixel_values_high"][i : i + 1]) for i in range(3)]
    clip, sam = model.clip_features(pairs[0][0]), model.vocabulary_features(pairs[0][1])
    case.check("single_clip_feature", clip)
    case.check("single_sam_feature", sam)
    clip_half, sam_half = model.project(clip, sam).chunk(2, dim=-1)
    case.check("single_clip_projected", clip_half)
    case.check("single_sam_projected", sam_half)

    single = model(data["single_input_ids"], [pairs[0]])
    case.check("single_merged_embeds", single.merged_embeds)
    for index, state in enumerate(single.block_inputs):
        case.check(f"single_hidden_{index}", state)
    case.check("single_last_hidden", single.last_hidden)
    case.check("single_logits", single.logits)
    cache = model.new_cache(1, 300)
    model.prefill(single.merged_embeds, cache)
    case.check("single_cache_key_0", cache.keys[0][:, :, : cache.length].transpose(1, 2))
    case.check("single_cache_value_0", cache.values[0][:, :, : cache.length].transpose(1, 2))
    generated = model.generate(data["single_input_ids"], [pairs[0]], max_new_tokens=16)
    case.check("single_gen_ids", generated.ids)
    case.check("single_gen_logits", torch.stack(generated.logits))
    generated = model.generate(
        data["gen_input_ids"], pairs, attention_mask=data["gen_attention_mask"], max_new_tokens=16
    )
    case.check("gen_ids", generated.ids)
    case.check("gen_logits", torch.stack(generated.logits))

    both = (data["pixel_values_clip"][1:3], data["pixel_values_high"][1:3])
    two = model(data["two_input_ids"], [both])
    case.check("two_merged_embeds", two.merged_embeds)
    case.check("two_logits_tail", two.logits[:, -32:])
    case.check("text_logits", model(data["text_input_ids"]).logits)
    output = model(**toy_batch(data))
    case.check("batch_logits", output.logits * data["batch_attention_mask"][..., None])
    case.check("batch_loss_eval", output.loss)
    assert all(key == "loss" or key.startswith(("grad:", "after:")) for key in case.expected), case.expected.keys()


def test_toy_golden_training():
    case = Case("toy")
    case.check_training(case.model(), **toy_batch(case.inputs))
    assert not [key for key in case.expected if key.startswith(("grad:", "after:"))]


def high_pixels(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGB").resize((1024, 1024), Image.Resampling.BICUBIC)
    values = (np.asarray(image, np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(values.transpose(2, 0, 1)[None].copy())


@torch.no_grad()
def test_toy_e2e_golden():
    case = Case("toy_e2e")
    model, input_ids = case.model(), case.inputs["input_ids"]
    pair = torch.from_numpy(case.expected.pop("pixel_values_clip"))[None], high_pixels(case.folder / "image.png")
    case.check("pixel_values_high_sample", pair[1][0, :, 5::16, 5::16])
    case.check("clip_feature", model.clip_features(pair[0]))
    case.check("sam_feature", model.vocabulary_features(pair[1]))
    output = model(input_ids, [pair])
    case.check("merged_embeds", output.merged_embeds)
    case.check("last_hidden", output.last_hidden)
    case.check("logits_last_position", output.logits[0, -1])
    case.check_top8("top8", output.logits[0])
    generated = model.generate(input_ids, [pair], max_new_tokens=16)
    case.check("gen_ids", generated.ids)
    case.check_top8("gen_top8", torch.cat(generated.logits))
    case.check_complete()


def test_qwen_long_golden():
    case = Case("qwen_long")
    for length in (48, 64, 65, 128, 130):
        model, input_ids = case.model(), case.inputs[f"ids_{length}"]
        with torch.no_grad():
            output = model(input_ids)
        case.check(f"logits_{length}", output.logits)
        case.check(f"last_hidden_{length}", output.last_hidden)
        case.check(f"hidden_1_{length}", output.block_inputs[1])
        cache = model.new_cache(1, 160)
        last = model.prefill(output.merged_embeds, cache)
        torch.testing.assert_close(last, output.logits[:, -1])
        case.check(f"cache_key_0_{length}", cache.keys[0][:, :, :length].transpose(1, 2))
        case.check(f"cache_value_0_{length}", cache.values[0][:, :, :length].transpose(1, 2))
        case.check(f"ntk_alpha_{length}", torch.tensor(cache.positions.alpha))
        case.check(f"inv_freq_{length}", inverse_frequencies(16, 10000.0, cache.positions.alpha))
    case.check("logn_table", logn_multipliers(512, 64))
    for length in (56, 65):
        generated = case.model().generate(case.inputs[f"gen_ids_{length}"], max_new_tokens=16)
        case.check(f"gen_{length}_ids", generated.ids)
        case.check(f"gen_{length}_logits", torch.stack(generated.logits))
        case.check(f"gen_{length}_ntk_alpha", torch.tensor(ntk_alpha(length, 64)))
    batch = {"input_ids": case.inputs["ids_130"], "labels": case.inputs["train_labels"]}
    case.check("train_logits", case.check_training(case.model(), **batch))
    case.check_complete()
