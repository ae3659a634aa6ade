"""A small Vary-tiny reads the pages of its training from their pictures, not from memory of one answer."""

import json

import pytest
from PIL import Image, ImageDraw, ImageFont

from mindvlm.api import load
from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.tiny_vary import write_tiny_opt
from tests.training.small_job import write_job

TEXTS = (
    "the cat sat here", "nine red boats", "a cold morning", "sums of money", "left at the inn",
    "open the window", "two blue birds", "salt and pepper", "no more trains", "quiet as a mouse",
)  # fmt: skip
SIZES = {
    "model__language_model__hidden_size": 64,
    "model__language_model__head_dim": 32,
    "model__language_model__intermediate_size": 128,
    "model__vision_vocabulary": {
        "embed_dim": 48, "depth": 2, "num_heads": 2, "global_attn_indexes": [1], "window_size": 4,
        "image_size": [64, 128], "patch_size": 8, "out_chans": 32, "net_2_channels": 48, "net_3_channels": 64,
    },
    "processor__high": {"size": [64, 128], "resize": "squash"},
    "mode": "graph",
}  # fmt: skip


def write_pages(folder) -> list[str]:
    """Writes a data set `pages`; returns the paths of its pictures."""
    records, paths = [], []
    for number, text in enumerate(TEXTS):
        page = Image.new("RGB", (128, 64), "white")
        font = ImageFont.load_default(size=17)
        ImageDraw.Draw(page).multiline_text((2, 0), text.replace(" ", "\n"), font=font, spacing=-2, fill="black")
        paths.append(str(folder / f"{number}.png"))
        page.save(paths[-1])
        turns = [{"from": "human", "value": "<image>\nRead."}, {"from": "gpt", "value": text}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / "pages.json").write_text(json.dumps(records))
    (folder / "registry.yaml").write_text(json.dumps({"pages": {"images": ".", "annotations": "pages.json"}}))
    return paths


@pytest.mark.slow
def test_ten_pages_in_300_steps_of_two(tmp_path):
    schedule = {"total_steps": 300, "warmup_steps": 20}
    path = write_job(tmp_path, kind="tiny", mode="graph", data__datasets="pages", schedule=schedule, log_every=50)
    pages, model = write_pages(tmp_path), write_tiny_opt(tmp_path, **SIZES)
    Trainer(read_job(path)).train()
    reader = load(model, checkpoint=str(tmp_path / "run" / "step-300" / "weights.safetensors"), cache=False)
    assert [str(reader.chat("Read.", page, max_new_tokens=40)) for page in pages] == list(TEXTS)
