"""The torch reference of SliME against the recorded arrays of the original program, and its fixed positions."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from mindvlm.convert.reference.slime import ReferenceSlime, retiled, sine_positions
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import STATISTICS
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from tests.golden_files import golden_json, golden_path

BOUND = 1e-5
CASE = "slime/vicuna_small"
PLACEHOLDER = -200
GRIDS = {"wide": (3, 2), "tall": (1, 3), "square": (1, 2)}


@pytest.fixture(scope="module")
def model() -> ReferenceSlime:
    config = from_hf_config(
        golden_json(f"{CASE}/config.json"), vision_config=golden_json(f"{CASE}/vision_tower/config.json")
    )
    weights = load_file(golden_path(CASE) / "weights.safetensors")
    state = {name: value.float() for name, value in weights.items() if name.split(".")[-1] not in STATISTICS}
    return ReferenceSlime.from_state(config, state, device="cpu")


def assert_close(actual: torch.Tensor, expected: np.ndarray, name: str) -> None:
    actual = np.asarray(actual.detach())
    assert actual.shape == expected.shape, name
    error = np.linalg.norm((actual - expected).ravel()) / np.linalg.norm(expected.ravel())
    assert error <= BOUND, f"{name}: {error:.2e}"


def prompt(ids: np.ndarray, num_rows: int) -> torch.Tensor:
    """Returns the ids (1, L) with a placeholder for each row."""
    place = ids.tolist().index(PLACEHOLDER)
    return torch.tensor([[*ids[:place].tolist(), *[PLACEHOLDER_ID] * num_rows, *ids[place + 1 :].tolist()]])


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_recorded_samples(model, name):
    inputs, outputs = (np.load(golden_path(CASE) / f"{kind}.npz") for kind in ("inputs", "outputs"))
    projector, compression = model.model.mm_projector, model.model.sampler.post_qformer
    features = model.tower_features(torch.from_numpy(inputs[f"{name}.pixel_values"]))
    whole, crops = features[:1], features[1:]
    resampled, compressed = projector.attn(whole), compression(crops)
    global_rows, projected = projector(whole)[0], projector.projection(compressed)
    local = retiled(projected, GRIDS[name])
    found = {
        "tower_features": features,
        "global_resampled": resampled[0],
        "global_expert_mlp": projector.projection(whole)[0],
        "global_expert_resampler": projector.projection(resampled)[0],
        "gate_weights": projector.gates(whole)[0],
        "global_tokens": global_rows,
        "local_resampled": compressed,
        "local_projected": projected,
        "local_merged": local,
    }
    for prefix in ("", "gen_"):
        ids = inputs[f"{name}.{prefix}input_ids"]
        scores = model.router_scores(local, torch.from_numpy(ids[ids != PLACEHOLDER]))
        kept = model.kept(scores)
        np.testing.assert_array_equal(kept, outputs[f"{name}.{prefix}kept_indices"])
        rows = model.image_rows(global_rows, local[kept])
        merged = model.merge(prompt(ids, len(rows)), [rows])
        found[f"{prefix}router_scores"] = scores
        if prefix:
            cache = model.new_cache(1, merged.shape[1] + 16)
            steps = [model.prefill(merged, cache)]
            while len(steps) < 16:
                steps.append(model.decode_step(steps[-1].argmax(-1), cache))
            found["gen_step_logits"] = torch.cat(steps)
            np.testing.assert_array_equal(torch.cat(steps).argmax(-1), outputs[f"{name}.gen_greedy_ids"])
        else:
            hidden, inputs_of_blocks = model.model.decode(merged)
            found |= {"inputs_embeds": merged[0], "hidden_after_layer0": inputs_of_blocks[1][0]}
            found |= {"last_hidden_state": hidden[0], "logits": model.logits(hidden)[0]}
            labels = torch.from_numpy(outputs[f"{name}.mm_labels"]).long()
            found["loss"] = F.cross_entropy(found["logits"][:-1], labels[1:], ignore_index=-100)
    for stage, value in found.items():
        assert_close(value, outputs[f"{name}.{stage}"], f"{name}.{stage}")


def test_fixed_positions_are_those_of_the_published_files(model):
    """A file of trained tensors lacks them."""
    for resampler in (model.model.mm_projector.attn, model.model.sampler.post_qformer):
        torch.testing.assert_close(sine_positions(*resampler.pos_embed.shape), resampler.pos_embed, rtol=0, atol=0)
