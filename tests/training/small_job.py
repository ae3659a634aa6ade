"""Training jobs that are over in seconds: a Vary of a few thousand weights and a data set of small pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from mindvlm.checkpoint import open_checkpoint
from mindvlm.training.job_file import Job, read_job
from tests.tiny_slime import write_tiny_slime
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import write_tiny_opt, write_tiny_vary

WRITERS = {
    "toy": write_tiny_vary,
    "tiny": write_tiny_opt,
    "tinyllava": write_tiny_tinyllava,
    "slime": write_tiny_slime,
}
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def write_data(folder: Path, num_records: int = 12, *, name: str = "words") -> Path:
    """Pictures of words with their text, every fourth record without a picture; returns the registry."""
    images = folder / name
    images.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(num_records):
        word = WORDS[number % len(WORDS)]
        if number % 4 == 3:
            turns = [{"from": "human", "value": f"Say {word}."}, {"from": "gpt", "value": word}]
            records.append({"conversations": turns})
            continue
        picture = Image.new("RGB", (64, 32), "white")
        ImageDraw.Draw(picture).text((4, 8), word, fill="black")
        picture.save(images / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nRead."}, {"from": "gpt", "value": f"{word} " * (1 + number % 3)}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / f"{name}.json").write_text(json.dumps(records, indent=1))
    registry = folder / "registry.yaml"
    entries = yaml.safe_load(registry.read_text()) if registry.exists() else {}
    entries[name] = {"images": name, "annotations": f"{name}.json"}
    registry.write_text(yaml.safe_dump(entries))
    return registry


def write_job(folder: Path, *, kind: str = "toy", **changes: Any) -> Path:
    """Writes model, data and job into the folder; a change is named by its key, with "__" between sections."""
    model = WRITERS[kind](folder)
    registry = write_data(folder)
    data = {
        "family": kind if kind in ("tinyllava", "slime") else "vary",
        "model_config": model.name,
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "mode": "pynative",
        "seed": 3,
        "data": {
            "registry": registry.name,
            "datasets": "words",
            "batch_size": 2,
            "max_length": 96,
            "lengths": [96],
            "num_workers": 0,
        },
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
        "schedule": {"total_steps": 6, "warmup_steps": 2},
        "log_every": 1,
        "evaluate_every": 100,
        "save_every": 100,
    }
    for path, value in changes.items():
        section = data
        *sections, key = path.split("__")
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def small_job(folder: Path, **changes: Any) -> Job:
    """The same, read."""
    return read_job(write_job(folder, **changes))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of every log line, with all digits."""
    return [(one["step"], one["loss"], one["norm"]) for one in metrics(folder) if "loss" in one]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint file, or of all the files of a checkpoint's folder."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open_checkpoint(file) as checkpoint:
            tensors |= {name: checkpoint.read(name).data.copy() for name in checkpoint.infos}
    return tensors
