"""The training job that corresponds to the arguments of a recorded run of the official TinyLLaVA program."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from mindvlm.models.tinyllava.records import RECORD_FORMATS
from mindvlm.models.tinyllava.templates import TEMPLATES
from mindvlm.training.datasets.grouping import group_by_modality, modality_length
from mindvlm.training.job_file import Job, read_job
from tests.golden_readers.case import Case

Arguments = dict[str, str]
# what the original takes for a version that it does not know
LLAVA = RECORD_FORMATS["llava"]
DEFAULT_TEMPLATE = "vicuna_v1"
NO_DECAY = ["bias$", r"(norm[^.]*|feed_forward\.0)\.weight$"]
# their value means that none of the tower's layers learns
FROM_LAYER = 100
DECAYS = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}


def is_on(arguments: Arguments, name: str) -> bool:
    return arguments.get(name) == "True"


def write_job(case: Case, arguments: Arguments, weights: list[Path], folder: Path) -> Job:
    """Writes the production job for the arguments to the folder.

    Args:
        weights: the initial weights, in order.
    """
    root = case.folder.resolve()
    data = root / arguments["data_path"]
    registry = {"data": {"annotations": str(data), "images": str(root / arguments["image_folder"]), "format": "llava"}}
    (folder / "registry.yaml").write_text(yaml.safe_dump(registry))
    config = json.loads((root / arguments["model_name_or_path"] / "config.json").read_text())
    tower = json.loads((root / arguments["vision_tower"] / "config.json").read_text())
    max_length = int(arguments["model_max_length"])
    tuned = policy(arguments, num_tower_layers(tower))
    version = arguments["version"]
    job = {
        "family": "tinyllava",
        "model_config": str(root / arguments["model_name_or_path"]),
        "model_changes": {
            "vision_tower": str(root / arguments["vision_tower"]),
            "model": {
                "connector": {"type": arguments["mm_projector_type"]},
                "language_model": {"vocab_size": config["vocab_size"]},
                "max_length": max_length,
                "tune": tuned.pop("tune"),
            },
            "processor": {
                "template": version if version in TEMPLATES else DEFAULT_TEMPLATE,
                "vocab_size": config["vocab_size"],
                "use_im_start_end": is_on(arguments, "mm_use_im_start_end"),
                "use_im_patch_token": is_on(arguments, "mm_use_im_patch_token"),
                "image": {"padding": "centre" if arguments.get("image_aspect_ratio") == "pad" else "none"},
                "original_parse": True,
            },
        },
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "data": {
            "registry": "registry.yaml",
            "datasets": "data",
            "batch_size": int(arguments["per_device_train_batch_size"]),
            "max_length": max_length,
            "lengths": [max_length],
            "index_folder": str(folder),
            "num_workers": 0,
        },
        "init": {"weights": list(map(str, weights))},
        "optimizer": optimizer(arguments),
        "schedule": schedule(arguments, len(json.loads(data.read_text()))),
        "accumulation": int(arguments["gradient_accumulation_steps"]),
        "averages_passes": True,
        **tuned,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return read_job(folder / "job.yaml")


def optimizer(arguments: Arguments) -> dict[str, Any]:
    rate = float(arguments["learning_rate"])
    betas = [float(arguments.get(f"adam_beta{number}", default)) for number, default in ((1, 0.9), (2, 0.999))]
    factors = {}
    if "mm_projector_lr" in arguments:
        factors = {r"^mm_projector\.": float(arguments["mm_projector_lr"]) / rate}
    return {
        "learning_rate": rate,
        "betas": betas,
        "eps": float(arguments.get("adam_epsilon", 1e-8)),
        "max_grad_norm": float(arguments.get("max_grad_norm", 1.0)),
        "weight_decay": float(arguments["weight_decay"]),
        "no_decay": NO_DECAY,
        "learning_rate_factors": factors,
    }


def schedule(arguments: Arguments, num_records: int) -> dict[str, Any]:
    num_batches = math.ceil(num_records / int(arguments["per_device_train_batch_size"]))
    steps_per_epoch = max(1, num_batches // int(arguments["gradient_accumulation_steps"]))
    kind = arguments["lr_scheduler_type"]
    return {
        "total_steps": math.ceil(float(arguments["num_train_epochs"]) * steps_per_epoch),
        "warmup_ratio": 0.0 if kind == "constant" else float(arguments.get("warmup_ratio", 0.0)),
        "warmup_from_zero": True,
        "decay": DECAYS[kind],
    }


def num_tower_layers(tower: dict[str, Any]) -> int:
    """Returns the number of layers that the original keeps; it drops SigLIP's last layer."""
    tower = tower.get("vision_config", tower)
    return tower["num_hidden_layers"] - ("siglip" in tower["model_type"])


def policy(arguments: Arguments, num_layers: int) -> dict[str, Any]:
    """Returns the section `tune` of the model, and `freeze` and `train` of the job.

    The flags apply in the order of the original; a later one overrides earlier ones.
    """
    tune: dict[str, Any] = {}
    freeze, train = [], []
    if is_on(arguments, "tune_mm_mlp_adapter"):
        tune["language_model"] = False
    elif is_on(arguments, "freeze_backbone"):
        freeze = [r"^language_model\.(embed_tokens|layers|norm)\."]
    if is_on(arguments, "freeze_mm_mlp_adapter"):
        tune["connector"] = False
    if is_on(arguments, "tune_entire_model"):
        first = int(arguments.get("tune_vit_from_layer", FROM_LAYER))
        tune, freeze = {"vision_tower_from_layer": first if first < num_layers else None}, []
    if is_on(arguments, "tune_embed_tokens"):
        if "language_model" in tune:
            tune["embed_tokens"] = True
        else:
            train = [r"^language_model\.embed_tokens\."] if freeze else []
            freeze = [*freeze, r"^language_model\.lm_head\."]
    return {"tune": tune, "freeze": freeze, "train": train}


def epochs_of(arguments: Arguments, records: list[dict], permutations: list[list[int]]) -> list[list[int]]:
    """Returns the records of every epoch in order, from the permutations that the original drew."""
    drawn = iter(permutations)
    lengths = [modality_length(record, LLAVA) for record in records]
    options = {"batch_size": int(arguments["per_device_train_batch_size"]), "num_shards": 1}
    found = []
    for _ in range(int(arguments["num_train_epochs"])):
        if is_on(arguments, "group_by_modality_length"):
            found.append(group_by_modality(lengths, permute=lambda n: drawn_of_size(next(drawn), n), **options))
        else:
            found.append(next(drawn))
            # the sampler draws once more behind each epoch
            next(drawn, None)
    return found


def drawn_of_size(permutation: list[int], size: int) -> list[int]:
    if len(permutation) != size:
        raise ValueError(f"a permutation of {len(permutation)} is recorded where one of {size} is drawn")
    return permutation
