"""Checkpoints as training programs write them: parts in folders of their own, adapters, and other layouts of names."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from mindvlm.weights.opened import open_native
from tests.known_models import ALL
from tests.models.tinyllava.test_names import (
    factory_names,
    legacy_names,
    random_tensors,
    read_all,
    view,
)

RANK, ALPHA = 2, 4
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def save_torch(tensors: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    return path


def opened_tensors(*paths, **options) -> dict[str, np.ndarray]:
    with open_native(paths, ALL, **options) as opened:
        return read_all(opened.source)


def factors(tensors: dict, modules=ADAPTED) -> dict[str, np.ndarray]:
    """Random factors by the names of TinyLLaVABench."""
    shapes = {name: tensors[f"{name}.weight"].shape for name in modules}
    pairs = {f"{name}.lora_A.weight": (RANK, columns) for name, (_, columns) in shapes.items()}
    pairs |= {f"{name}.lora_B.weight": (rows, RANK) for name, (rows, _) in shapes.items()}
    return random_tensors(pairs)


def write_adapter(folder: Path, tensors: dict, weights: str = "adapter_model.bin") -> Path:
    save_torch(tensors, folder / weights)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    return folder


def merged(tensors: dict, pairs: dict) -> dict[str, np.ndarray]:
    """The native tensors with the change of each pair added."""
    changed = dict(tensors)
    for name in ADAPTED:
        product = pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
        changed[f"{name}.weight"] = tensors[f"{name}.weight"] + ALPHA / RANK * product
    return read_all(view(changed))


def assert_close(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def split_factory(folder: Path, tensors: dict, *, base_layer: bool = False) -> dict[str, np.ndarray]:
    """Moves the weights of a Factory folder into the sub-folders that its recipes save."""
    parts = {
        "language_model.": "language_model",
        "vision_tower._vision_tower.": "vision_tower",
        "connector.": "connector",
    }
    names, config = factory_names(tensors), json.loads((folder / "config.json").read_text())
    for prefix, part in parts.items():
        inside = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
        if base_layer:
            adapted = {f"{name}.weight": f"{name}.base_layer.weight" for name in ADAPTED}
            inside = {adapted.get(name, name): value for name, value in inside.items()}
        save_torch(inside, folder / part / "pytorch_model.bin")
        if described := config.get({"language_model": "text_config", "vision_tower": "vision_config"}.get(part)):
            (folder / part / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").unlink()
    return names


def write_parts(folder: Path, tensors: dict, *, config: dict | None) -> list[Path]:
    """A decoder with a config.json, a tower and a connector, each saved alone."""
    parts: list[dict] = [{}, {}, {}]
    for name, value in tensors.items():
        index = 1 if "vision_tower" in name else 2 if "mm_projector" in name else 0
        parts[index][name.removeprefix("model.vision_tower.vision_tower.")] = value
    paths = [folder / "decoder/model.safetensors", folder / "tower/model.safetensors", folder / "mm_projector.bin"]
    for path, part in zip(paths, parts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(part, path) if path.suffix == ".safetensors" else save_torch(part, path)
    if config:
        (folder / "decoder/config.json").write_text(json.dumps(config))
    return [paths[0].parent, paths[1].parent, paths[2]]


def memory_names(tensors: dict) -> dict[str, np.ndarray]:
    """The names of transformers' llava in memory since 4.52."""
    moved = {}
    for name, value in legacy_names(tensors).items():
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        moved[f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_projector.")) else name] = value
    return moved


def shorter_tower(tensors: dict) -> dict[str, np.ndarray]:
    """A tower's names in transformers 5."""
    return {name.replace("vision_model.", ""): value for name, value in tensors.items()}


LAYOUTS = {
    "Hugging Face": dict,
    "TinyLLaVA Factory": factory_names,
    "transformers llava": legacy_names,
    "transformers llava in memory": memory_names,
    "native": lambda tensors: read_all(view(tensors)),
}


def adapter_names(layout: str, pairs: dict) -> dict[str, np.ndarray]:
    """The names of an adapter whose base has this layout."""
    if layout == "native":
        named = {name.replace("model.", "language_model."): value for name, value in pairs.items()}
    else:
        named = LAYOUTS[layout](pairs)
    return {f"base_model.model.{name}": value for name, value in named.items()}
